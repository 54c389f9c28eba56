"""The points of a sweep: a base configuration and what each point changes in it."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upo.config import RunConfig, load_config, watched
from upo.config_file import Source, read_yaml
from upo.errors import ConfigError, did_you_mean

KEYS = ("base", "grid", "points", "front")
LONGEST = 80  # characters of a folder's name


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str  # of its folder
    set: dict[str, Any]  # dotted key -> value
    config: RunConfig


@dataclass(frozen=True)
class Sweep:
    """All of them, and the metrics whose trade-off is asked for; without any, accuracy and the goals."""

    points: list[Point]
    front: tuple[str, ...]


def read_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """A sweep file: `base` (a configuration file, or a configuration itself), `grid` (key -> list of values) and `points` (a list of
    {key: value}, with a `name` if one is wanted); every point is combined with every combination of the grid. `overrides` hold for all.

    Raises ConfigError naming the point, before anything runs, for all points that are no configuration.
    """
    source = read_yaml(path)
    for key in source.data:
        if key not in KEYS:
            raise ConfigError(f"{source.place([key])}{key}: unknown key of a sweep.{did_you_mean(key, KEYS)}")
    base = source.data.get("base")
    if not isinstance(base, (str, Mapping)):
        raise ConfigError(f"{source.place(['base'])}base: name a configuration file, or write the configuration here.")
    settings = _settings(source)
    keys = list(dict.fromkeys(key for _, changes in settings for key in changes))
    short = {key: _short(key, keys) for key in keys}
    points: list[Point] = []
    faults = []
    for given, changes in settings:
        name = given or _name({short[key]: value for key, value in changes.items()})
        if double := next((p for p in points if p.name == name), None):
            same = "the same as another" if double.set == changes else "named like another"
            raise ConfigError(f"{path}: the point {name} is {same}. Remove one, or give it a name of its own (name: ...).")
        try:
            config = load_config(Path(base) if isinstance(base, str) else base, [*overrides, *(f"{key}={json.dumps(value)}" for key, value in changes.items())])
        except ConfigError as error:
            faults += [f"{path}: point {name}: {line}" for line in str(error).splitlines()]
            continue
        points.append(Point(name, changes, config))
    if faults:
        raise ConfigError("\n".join(faults))
    return Sweep(points, _front(source))


def _settings(source: Source) -> list[tuple[str | None, dict[str, Any]]]:
    """(given name, changes) of every point, in order."""
    grid, listed = source.data.get("grid") or {}, source.data.get("points") or [{}]
    if not grid and listed == [{}]:
        raise ConfigError(f"{source.path}: no points. Give grid: {{KEY: [VALUE, ...]}}, points: [{{KEY: VALUE}}, ...], or both.")
    if not isinstance(grid, Mapping):
        raise ConfigError(f"{source.place(['grid'])}grid: must be a mapping, {{KEY: [VALUE, ...]}}.")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{source.place(['grid', key])}grid.{key}: must be a list of values, e.g. [1.0, 3.0].")
    if not isinstance(listed, list) or not all(isinstance(point, Mapping) for point in listed):
        raise ConfigError(f"{source.place(['points'])}points: must be a list of mappings, [{{KEY: VALUE}}, ...].")
    cells = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    settings = []
    for number, point in enumerate(listed):
        changes = {key: value for key, value in point.items() if key != "name"}
        if both := sorted(set(changes) & set(grid)):
            raise ConfigError(f"{source.place(['points', str(number)])}points.{number}: {both[0]} is in the grid too. Leave it out of one of them.")
        for cell in cells:
            name = point.get("name")
            tail = _name({_short(key, list(grid)): value for key, value in cell.items()}) if cell else ""
            settings.append((None if name is None else ",".join(filter(None, (_slug(str(name)), tail))), {**changes, **cell}))
    return settings


def _front(source: Source) -> tuple[str, ...]:
    front = source.data.get("front") or []
    if not isinstance(front, list):
        raise ConfigError(f"{source.place(['front'])}front: must be a list of metrics, e.g. [accuracy, goal/readability].")
    try:
        return tuple(watched(str(name)) for name in front)
    except ValueError as error:
        raise ConfigError(f"{source.place(['front'])}front: {error}") from None


def _short(key: str, keys: Sequence[str]) -> str:
    """The shortest end of a dotted key that no other one has."""
    parts = key.split(".")
    ends = (".".join(parts[-n:]) for n in range(1, len(parts)))
    return next((end for end in ends if not any(other != key and (other == end or other.endswith(f".{end}")) for other in keys)), key)


def _name(changes: Mapping[str, Any]) -> str:
    """`gamma=3.0,temperature=5`; what is too long is cut and told apart by a hash."""
    name = ",".join(f"{key}={_slug(value if isinstance(value, str) else json.dumps(value))}" for key, value in changes.items()) or "base"
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 9]}-{hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:8]}"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", text.strip('{}[]" ')).lstrip(".").rstrip("-.") or "x"
