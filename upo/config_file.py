"""Reading a configuration: YAML with its line numbers, `--set` overrides, and validation errors in the user's own words."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from upo.errors import ConfigError, did_you_mean

Keys = tuple[str, ...]


@dataclass
class Source:
    """Raw configuration values and where each was written."""

    data: dict[str, Any]
    path: str = ""  # of the file, empty for a mapping
    root: yaml.Node | None = None
    overrides: list[Keys] = field(default_factory=list)

    def place(self, keys: Sequence[str]) -> str:
        """`run.yaml:12: ` for the deepest of these keys that the file has, `--set: ` where an override gave it, or nothing."""
        if any(tuple(keys[: len(o)]) == o for o in self.overrides):
            return "--set "
        if self.root is None:
            return f"{self.path}: " if self.path else ""
        node, line = self.root, self.root.start_mark.line
        for key in keys:
            child = _child(node, key)
            if child is None:
                break
            node, line = child
        return f"{self.path}:{line + 1}: "


def read_yaml(path: Path) -> Source:
    """A YAML mapping with its lines. Raises ConfigError with file and line; a key given twice is an error, not a choice."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Start from one of the files in examples/, or see `upo quickstart`.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).") from None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is not None:
            _check_keys(root, path, set())
        data = None if root is None else loader.construct_document(root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML ({getattr(error, 'problem', None) or error}).") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML ({error}).") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys (`model: ...`); this file {_what(data)}.")
    return Source(data, str(path), root)


def apply_override(source: Source, override: str) -> None:
    """Set a dotted key, `objective.preference.0.beta=0.2`; the value is read as YAML, so lists and mappings work too."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ConfigError(f'--set {override}: write KEY=VALUE, e.g. --set "optimizer.lr=1e-5".')
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"--set {key}: the value {text} is not valid YAML; text with special characters needs quotes.") from None
    *parents, last = key.split(".")
    node: Any = source.data
    for depth, part in enumerate(parents):
        node = _descend(node, part, key, ".".join(parents[:depth]))
    if isinstance(node, list) and len(node) == 1 and not last.isdigit():
        node = node[0]
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"--set {key}: {'.'.join(parents)} is not a mapping in the configuration.")
    source.overrides.append(tuple(key.split(".")))


def explain(error: Mapping[str, Any], schema: type[BaseModel], source: Source) -> str:
    """One line for one of pydantic's errors: place, key as the user wrote it, what is wrong, and the remedy."""
    keys = _as_written(error["loc"], source.data)
    key, kind, got, context = ".".join(keys), error["type"], error.get("input"), error.get("ctx", {})
    message = {
        "missing": "required, but not given",
        "float_type": "must be a number",
        "float_parsing": "must be a number",
        "int_type": "must be a whole number",
        "int_parsing": "must be a whole number",
        "int_from_float": "must be a whole number",
        "bool_parsing": "must be true or false",
        "string_type": "must be text; put it in quotes",
        "string_too_short": "must not be empty",
        "tuple_type": "must be a list",
        "finite_number": "must be finite",
        "greater_than": f"must be above {context.get('gt')}",
        "greater_than_equal": f"must be at least {context.get('ge')}",
        "less_than": f"must be below {context.get('lt')}",
        "less_than_equal": f"must be at most {context.get('le')}",
        "literal_error": f"must be {context.get('expected')}",
        "model_type": f"must be a mapping of keys ({', '.join(section.model_fields)})" if (section := _section(error["loc"], schema)) else "",
        "model_attributes_type": "must be a mapping of keys",
        "dict_type": "must be a mapping of keys",
    }.get(kind) or error["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        message = "unknown key." + _suggest(error["loc"], schema)
    elif kind == "missing" and isinstance(got, Mapping):
        near = did_you_mean(str(keys[-1]), map(str, got)) if got else ""
        message += f' ({near.strip().replace("Did you mean", "is it").rstrip("?")}?)' if "Did you mean" in near else ""
    elif isinstance(got, (str, int, float)) and "(got " not in message and f'"{got}"' not in message:
        message += f" (got {got if isinstance(got, (bool, int, float)) else repr(got[:60])})"
    named = re.match(r"[a-z_.]+(?=: )", message) if not key else None  # a check over several sections names its key itself
    return source.place(named.group().split(".") if named else keys) + (f"{key}: {message}" if key else message)


def walk(schema: type[BaseModel], prefix: Keys = ()) -> Iterator[tuple[Keys, FieldInfo, type[BaseModel] | None]]:
    """Every key of a configuration, depth first: its path, its field, and the section it opens, if it opens one."""
    for name, info in schema.model_fields.items():
        inner = _inner(info)
        yield (*prefix, name), info, inner
        if inner is not None:
            yield from walk(inner, (*prefix, name))


def leaves(annotation: Any) -> list[Any]:
    """The types in a union, an optional or a tuple."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple):
        return [leaf for arg in typing.get_args(annotation) for leaf in leaves(arg)]
    return [annotation]


def _inner(info: FieldInfo) -> type[BaseModel] | None:
    return next((a for a in leaves(info.annotation) if isinstance(a, type) and issubclass(a, BaseModel)), None)


def _section(location: Sequence[Any], schema: type[BaseModel]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = schema
    for key in location:
        if isinstance(key, str) and section is not None:
            section = _inner(section.model_fields[key]) if key in section.model_fields else None
    return section


def _suggest(location: Sequence[Any], schema: type[BaseModel]) -> str:
    word, section = str(location[-1]), _section(location[:-1], schema)
    known = list(section.model_fields) if section else []
    near = did_you_mean(word, known)
    elsewhere = [".".join(keys) for keys, _, _ in walk(schema) if keys[-1] == word]
    if "Did you mean" not in near and elsewhere:
        return f" Did you mean {' or '.join(elsewhere)}?"
    return near


def _as_written(location: Sequence[Any], data: Any) -> list[str]:
    """The error's path without the list positions that a shorthand (one loss instead of a list of one) does not show."""
    keys: list[str] = []
    for part in location:
        if isinstance(part, int):
            if not isinstance(data, (list, tuple)):
                continue
            data = data[part] if part < len(data) else None
        else:
            data = data.get(part) if isinstance(data, Mapping) else None
        keys.append(str(part))
    return keys


def _child(node: yaml.Node, key: str) -> tuple[yaml.Node, int] | None:
    if isinstance(node, yaml.MappingNode):
        return next(((v, k.start_mark.line) for k, v in node.value if k.value == key), None)
    if isinstance(node, yaml.SequenceNode) and key.isdigit() and int(key) < len(node.value):
        return node.value[int(key)], node.value[int(key)].start_mark.line
    return None


def _check_keys(node: yaml.Node, path: Path, seen: set[int]) -> None:
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag == "tag:yaml.org,2002:merge":
                pass
            elif key.tag != "tag:yaml.org,2002:str":
                raise ConfigError(f'{path}:{line}: the key "{key.value}" is not text; put it in quotes or correct it.')
            elif key.value in lines:
                raise ConfigError(f"{path}:{line}: {key.value} is given twice (first on line {lines[key.value]}); remove one.")
            else:
                lines[key.value] = line
            _check_keys(value, path, seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_keys(value, path, seen)


def _descend(node: Any, part: str, key: str, above: str) -> Any:
    if isinstance(node, list) and len(node) == 1 and not part.isdigit():
        node = node[0]  # `objective.preference.beta` where the file lists one loss
    if isinstance(node, list):
        return node[_index(node, part, key)]
    if not isinstance(node, dict):
        raise ConfigError(f"--set {key}: {above} is not a mapping in the configuration.")
    if node.get(part) is None:
        node[part] = {}
    elif part == "preference" and isinstance(node[part], str):
        node[part] = {"loss": node[part]}  # `preference: dpo` is short for this
    return node[part]


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f'--set {key}: "{part}" is not a position in a list of {len(node)}; they count from 0.')
    return int(part)


def _what(data: Any) -> str:
    return {type(None): "is empty", list: "is a list", str: "is a line of text"}.get(type(data), f"is a {type(data).__name__}")
