"""SVG by hand: elements with everything escaped, lines, and round numbers for an axis."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape as escape


def element(name: str, /, *children: str, **attributes: object) -> str:
    """`<name attribute="value">children</name>`. Children are markup; attributes are escaped, floats are shortened, `_` becomes `-`, and a
    trailing one (`class_`) falls away."""
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(_short(value))}"' for key, value in attributes.items())
    return f"<{name}{given}>{''.join(children)}</{name}>" if children else f"<{name}{given}/>"


def text(words: str, /, **attributes: object) -> str:
    """A `<text>` of plain words."""
    return element("text", escape(words, quote=False), **attributes)


def polyline(x: Iterable[float], y: Iterable[float], **attributes: object) -> str:
    """A line through points, to a tenth of a unit."""
    return element("polyline", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True)), **attributes)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    width = (high - low) / max(most - 1, 1)
    if not (math.isfinite(width) and width > 0):
        return [low]
    power = 10.0 ** math.floor(math.log10(width))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= width * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
