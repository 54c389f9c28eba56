"""Options of a loss: dataclass fields that know their range, so that checking, help and documentation read one declaration."""

from __future__ import annotations

from dataclasses import MISSING, field, fields
from math import inf
from typing import Any


def option(
    default: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] | None = None,
    optional: bool = False,
) -> Any:
    """A dataclass field with a range (`above` and `below` exclude the bound, `least` and `most` include it) or with choices.

    An `optional` text may be left empty.
    """
    rules = {"above": above, "least": least, "below": below, "most": most, "choices": choices, "optional": optional}
    return field(default=default, metadata=rules)


def describe_range(metadata: Any) -> str:
    """`above 0`, `in [0, 0.5)`, `a or b`; empty where anything of the type goes."""
    if metadata.get("choices"):
        return " or ".join(metadata["choices"])
    low, high = (_first(metadata, *names) for names in (("above", "least"), ("below", "most")))
    if low is not None and high is not None:
        return f"in {'(' if metadata['above'] is not None else '['}{low:g}, {high:g}{')' if metadata['below'] is not None else ']'}"
    if low is not None:
        return f"above {low:g}" if metadata["above"] is not None else ("not negative" if low == 0 else f"at least {low:g}")
    if high is not None:
        return f"below {high:g}" if metadata["below"] is not None else f"at most {high:g}"
    return ""


def check_options(term: Any, name: str, missing: str = "must name a column") -> None:
    """Raise ValueError for the first field of the dataclass instance `term` that is out of its range, not finite, or an empty text."""
    for f in fields(term):
        value, rule = getattr(term, f.name), f.metadata
        if rule.get("choices"):
            if value not in rule["choices"]:
                raise ValueError(f"{name}: {f.name} must be {describe_range(rule)} (got {value!r})")
            continue
        if isinstance(value, str):
            if not value and not rule.get("optional"):
                raise ValueError(f"{name}: {f.name} {missing}")
            continue
        sound = (
            -inf < value < inf
            and (rule.get("above") is None or value > rule["above"])
            and (rule.get("least") is None or value >= rule["least"])
            and (rule.get("below") is None or value < rule["below"])
            and (rule.get("most") is None or value <= rule["most"])
        )
        if not sound:
            wanted = describe_range(rule)
            finite = " and finite" if not wanted.startswith("in ") else ""
            raise ValueError(f"{name}: {f.name} must be {wanted + finite if wanted else 'finite'} (got {value})")


def typed(name: str, option: str, default: Any, value: Any) -> Any:
    """The value in the type of the option's default. Raises ValueError where it has none."""
    if isinstance(default, str):
        if not isinstance(value, str):
            raise ValueError(f"{name}: {option} must be text (got {value!r})")
        return value
    kind, wanted = (int, "a whole number") if isinstance(default, int) else (float, "a number")
    try:
        if isinstance(value, bool) or (kind is int and float(value) != int(value)):
            raise TypeError
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}: {option} must be {wanted} (got {value!r})") from None


def defaults(term: type) -> dict[str, Any]:
    """Option names of a loss with their defaults."""
    return {f.name: (None if f.default is MISSING else f.default) for f in fields(term)}


def ranges(term: type) -> dict[str, str]:
    """Option names of a loss with their ranges in words."""
    return {f.name: describe_range(f.metadata) for f in fields(term)}


def _first(metadata: Any, *names: str) -> Any:
    return next((metadata[n] for n in names if metadata.get(n) is not None), None)
