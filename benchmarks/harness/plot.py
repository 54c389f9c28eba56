"""Line plots with logarithmic axes, in the look of docs/plots.py. SVG, no dependency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, GAP = 300, 200, 62
STROKES = (("#0b5fa5", ""), ("#0b5fa5", "4 3"), ("#b3541e", ""), ("#2e7d32", ""), ("#2e7d32", "4 3"), ("#6a4c93", ""), ("#777777", "1 3"))


@dataclass(frozen=True)
class Curve:
    name: str
    points: Sequence[tuple[float, float]]  # both above 0


@dataclass(frozen=True)
class Panel:
    title: str
    across: str  # what the horizontal axis counts
    curves: Sequence[Curve]


def picture(panels: Sequence[Panel], columns: int = 2) -> str:
    """An SVG with the panels in rows and a legend below; a name has the same stroke in all of them."""
    names = list(dict.fromkeys(curve.name for panel in panels for curve in panel.curves))
    strokes = {name: STROKES[i % len(STROKES)] for i, name in enumerate(names)}
    rows = -(-len(panels) // columns)
    width, legend = columns * (WIDTH + GAP) + GAP // 2, rows * (HEIGHT + GAP) + GAP
    height = legend + 16 * len(names)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for i, panel in enumerate(panels):
        parts += _panel(panel, GAP + (i % columns) * (WIDTH + GAP), GAP // 2 + (i // columns) * (HEIGHT + GAP), strokes)
    for i, name in enumerate(names):
        y = legend + 16 * i - 16
        parts.append(f'<line x1="{GAP}" x2="{GAP + 30}" y1="{y}" y2="{y}" {_stroke(strokes[name])}/><text x="{GAP + 38}" y="{y + 4}" fill="#222222">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, x: int, y: int, strokes: dict[str, tuple[str, str]]) -> list[str]:
    lines = [f'<g transform="translate({x},{y})">', f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#f6f7f9"/>']
    lines.append(f'<text x="{WIDTH / 2:g}" y="-8" text-anchor="middle" font-weight="bold" fill="#222222">{escape(panel.title)}</text>')
    lines.append(f'<text x="{WIDTH / 2:g}" y="{HEIGHT + 29}" text-anchor="middle" fill="#555555">{escape(panel.across)}</text>')
    points = [point for curve in panel.curves for point in curve.points]
    if points:
        across, up = _Axis([p[0] for p in points], WIDTH), _Axis([p[1] for p in points], HEIGHT)
        for value in sorted({p[0] for p in points}):
            lines.append(f'<text x="{across(value):.1f}" y="{HEIGHT + 14}" text-anchor="middle" fill="#555555">{value:g}</text>')
        for value in up.ticks():
            at = HEIGHT - up(value)
            lines.append(f'<line x1="0" x2="{WIDTH}" y1="{at:.1f}" y2="{at:.1f}" stroke="#d9dde3"/><text x="-5" y="{at + 4:.1f}" text-anchor="end" fill="#555555">{value:.3g}</text>')
        for curve in panel.curves:
            path = " ".join(f"{across(a):.1f},{HEIGHT - up(b):.1f}" for a, b in curve.points)
            lines.append(f'<polyline points="{path}" fill="none" {_stroke(strokes[curve.name])}/>')
            lines += [f'<circle cx="{across(a):.1f}" cy="{HEIGHT - up(b):.1f}" r="2.5" fill="{strokes[curve.name][0]}"/>' for a, b in curve.points]
    return [*lines, "</g>"]


class _Axis:
    """Places of numbers on a logarithmic axis of this many pixels, with a margin at both ends."""

    def __init__(self, values: Sequence[float], size: int) -> None:
        self.low, self.high, self.size = min(values), max(values), size

    def __call__(self, value: float) -> float:
        span = math.log(self.high / self.low)
        return self.size * (0.5 if span == 0 else 0.06 + 0.88 * math.log(value / self.low) / span)

    def ticks(self) -> list[float]:
        """The steps 1, 2, 5, 10, ... within the range; its ends where there are fewer than two."""
        steps = [m * 10.0**e for e in range(-4, 6) for m in (1, 2, 5)]
        inside = [s for s in steps if self.low <= s <= self.high]
        return inside if len(inside) > 1 else sorted({self.low, self.high})


def _stroke(stroke: tuple[str, str]) -> str:
    color, dashes = stroke
    return f'stroke="{color}" stroke-width="2"' + (f' stroke-dasharray="{dashes}"' if dashes else "")
