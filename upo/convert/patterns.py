"""Which modules an adapter's configuration speaks of, as peft decides it, without trusting its regular expressions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from upo.convert.files import words
from upo.errors import ModelError


def matching(where: str, key: str, patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that fits the end of a path, as peft looks ranks and alphas up."""
    for pattern, value in patterns.items():
        if _compiled(where, key, pattern).match(path):
            return value
    return default


def _compiled(where: str, key: str, pattern: str) -> re.Pattern[str]:
    """Raises ModelError for an expression that is broken, or that could take forever: repeated groups, or many repetitions."""
    if len(pattern) > 2000 or re.search(r"\)[*+?{]|\\[1-9]|\(\?[^:]", pattern) or len(re.findall(r"(?<!\\)[*+{]", pattern)) > 3:
        raise ModelError(f"{where}: {key}: the expression {ascii(pattern)[:60]} is too involved to be run on trust. Write the module's full path.")
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise ModelError(f"{where}: {key}: {ascii(pattern)[:60]} is no regular expression ({error}).") from None


def check_targeted(where: str, config: Mapping[str, Any], paths: Sequence[str], parameters: Sequence[str]) -> None:
    """Raise ModelError for a module that has weights but is not among the configuration's targets: peft would not apply it.

    An expression (`target_modules` as one text) is not run; there the weights have the word.
    """
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return
    names = words(where, "target_modules", targets)
    excluded = config.get("exclude_modules")
    without = [] if isinstance(excluded, str) else words(where, "exclude_modules", excluded)
    layers = _layers(where, config.get("layers_to_transform"))
    lists = config.get("layers_pattern") or None
    named = "|".join(map(re.escape, words(where, "layers_pattern", [lists] if isinstance(lists, str) else lists))) or r"[^.]*"
    for path in paths:
        if any(f".{path}.weight".endswith(f".{name}") for name in parameters):
            continue
        whole = path in names
        hit = whole or any(path.endswith(f".{name}") for name in names)
        index = re.match(rf".*?\.(?:{named})\.(\d+)\.", f".{path}" if lists else path)
        if hit and not whole and layers is not None:
            hit = index is not None and int(index[1]) in layers
        if not hit or any(path == name or path.endswith(f".{name}") for name in without):
            raise ModelError(f"{where}: there are weights for {path}, which target_modules and its kin leave out; peft would not apply them. Refused.")


def _layers(where: str, value: Any) -> set[int] | None:
    if value is None or value == []:
        return None
    numbers = value if isinstance(value, list) else [value]
    if all(type(n) is int and n >= 0 for n in numbers):
        return set(numbers)
    raise ModelError(f"{where}: layers_to_transform must be layer numbers.")
