"""Extra numeric fields of a row, as one number per completion: what the `column` scorer reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def numeric_columns(record: Mapping[str, Any], fields: frozenset[str], kind: str, count: int) -> tuple[dict[str, tuple[float, ...]], set[str]]:
    """Columns of a row with `count` completions, and the names of the fields they came from; `fields` are the layout's own, left out.

    Pairs: `<name>_chosen` and `<name>_rejected`, or `chosen_<name>` and `rejected_<name>`, give the column <name>. Groups: a list of
    `count` numbers. A plain number (or truth value) holds for each completion of its row. Whatever is not a finite number is no column.
    """
    columns: dict[str, tuple[float, ...]] = {}
    used: set[str] = set()
    if kind == "pair":
        for name, sides in _sided(record).items():
            values = [number(record[side]) for side in sides]
            if None not in values:
                columns[name] = tuple(v for v in values if v is not None)
                used |= set(sides)
    for name, value in record.items():
        if name in fields or name in used or name in columns:
            continue
        if kind == "group" and isinstance(value, Sequence) and not isinstance(value, str):
            values = [number(v) for v in value]
            if len(values) != count or None in values:
                continue
            columns[name] = tuple(v for v in values if v is not None)
        elif (plain := number(value)) is not None:
            columns[name] = (plain,) * count
        else:
            continue
        used.add(name)
    return columns, used


def _sided(record: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Column name -> the two fields that hold its sides."""
    found: dict[str, tuple[str, str]] = {}
    for field in record:
        for name, other in (
            (field.removesuffix("_chosen"), field.removesuffix("_chosen") + "_rejected"),
            (field.removeprefix("chosen_"), "rejected_" + field.removeprefix("chosen_")),
        ):
            if name and name != field and other in record:
                found.setdefault(name, (field, other))
    return found


def number(value: Any) -> float | None:
    """The value as a finite float, or None."""
    if not isinstance(value, (bool, int, float)):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) else None
