"""The report's charts, drawn for a phone's width: curves, intervals, and one quantity against another. Colours come from the page's style."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from upo import svg
from upo.report.evaluation import Interval

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 20, 10, 26
MOST_POINTS = 240  # of a curve; longer ones show means of equal stretches
COLOURS = 8


@dataclass(frozen=True)
class Line:
    """A metric of one run over its steps."""

    key: str  # the run's letter
    colour: int
    steps: np.ndarray  # [N]
    values: np.ndarray  # [N], NaN where there is none
    eval_steps: np.ndarray
    evals: np.ndarray


@dataclass(frozen=True)
class Point:
    """A run's change of a goal and what it cost elsewhere."""

    key: str
    colour: int
    x: float
    y: Interval
    front: bool = False  # no other run is better in both


class Axes:
    """The plot's frame: maps values to places, and draws grid and numbers."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], height: int = HEIGHT, left: int = LEFT) -> None:
        self.xs, self.ys = x, y
        self.left, self.right, self.top, self.bottom = left, WIDTH - RIGHT, TOP, height - BOTTOM

    def x(self, value: np.ndarray | float) -> np.ndarray:
        return self.left + (np.asarray(value, np.float64) - self.xs[0]) / (self.xs[1] - self.xs[0]) * (self.right - self.left)

    def y(self, value: np.ndarray | float) -> np.ndarray:
        return self.bottom - (np.asarray(value, np.float64) - self.ys[0]) / (self.ys[1] - self.ys[0]) * (self.bottom - self.top)

    def frame(self, y_numbers: bool = True, most: int = 6) -> list[str]:
        parts = []
        for value in svg.ticks(*self.ys, most=5) if y_numbers else ():
            at = float(self.y(value))
            parts.append(svg.element("line", x1=self.left, x2=self.right, y1=at, y2=at, class_="zero" if value == 0 and self.ys[0] < 0 else "grid"))
            parts.append(svg.text(short(value), x=self.left - 6, y=at + 4, text_anchor="end", class_="tick"))
        for value in svg.ticks(*self.xs, most=most):
            at = float(self.x(value))
            parts.append(svg.element("line", x1=at, x2=at, y1=self.top, y2=self.bottom, class_="grid"))
            parts.append(svg.text(short(value), x=at, y=self.bottom + 16, text_anchor="middle", class_="tick"))
        return parts


def curves(title: str, lines: Sequence[Line]) -> str:
    """One metric over the steps. Alone, a run shows each step thin and their running mean thick; of several only the means."""
    alone = len(lines) == 1
    drawn = [(line, *_binned(line.steps, line.values)) for line in lines]
    means = [_mean(values, window(len(values))) for _, _, values in drawn]
    shown = [*means, *(line.evals for line in lines), *(values for _, _, values in drawn if alone)]
    axes = Axes(_span([*(line.steps for line in lines), *(line.eval_steps for line in lines)], 0.02), _span(shown, 0.06))
    parts, ends = axes.frame(), []
    for (line, steps, values), mean in zip(drawn, means, strict=True):
        if alone:
            parts += _pieces(axes, steps, values, f"line thin c{line.colour}")
        parts += _pieces(axes, steps, mean, f"line c{line.colour}")
        if not alone and np.isfinite(mean).any():
            last = int(np.flatnonzero(np.isfinite(mean))[-1])
            ends.append((float(axes.y(mean[last])), line))
        parts += [
            svg.element("circle", cx=float(axes.x(s)), cy=float(axes.y(v)), r=4, class_=f"dot hollow c{line.colour}")
            for s, v in zip(line.eval_steps, line.evals, strict=True)
            if np.isfinite(v)
        ]
    for y, line in _apart(ends, 12.0):
        parts.append(svg.text(line.key, x=axes.right + 5, y=y + 4, class_=f"key end c{line.colour}"))
    return _svg(title, parts, HEIGHT)


def intervals(title: str, rows: Sequence[tuple[str, int, Interval]], null: float = 0.0) -> str:
    """Means with their 95 % intervals, one row for each run; the line at `null` is no change."""
    height = TOP + BOTTOM + 28 * len(rows)
    values = [np.array([interval.low, interval.high, null]) for _, _, interval in rows]
    axes = Axes(_span(values, 0.08), (0.0, 1.0), height, left=28 if len(rows) > 1 else RIGHT)
    parts = axes.frame(y_numbers=False)
    at = float(axes.x(null))
    parts.append(svg.element("line", x1=at, x2=at, y1=axes.top, y2=axes.bottom, class_="zero"))
    for i, (key, colour, interval) in enumerate(rows):
        y = TOP + 28 * i + 14
        if len(rows) > 1:
            parts.append(svg.text(key, x=8, y=y + 4, class_="key"))
        parts.append(svg.element("line", x1=float(axes.x(interval.low)), x2=float(axes.x(interval.high)), y1=y, y2=y, class_=f"bar c{colour}"))
        parts.append(svg.element("circle", cx=float(axes.x(interval.mean)), cy=y, r=5, class_=f"dot c{colour}"))
    return _svg(title, parts, height)


def tradeoff(title: str, points: Sequence[Point], starts: Sequence[tuple[int, float]]) -> str:
    """The change of a goal, with its interval, against another quantity after training; hollow where each run started (`starts`: colour, x)."""
    xs = np.array([p.x for p in points] + [x for _, x in starts])
    axes = Axes(_span([xs], 0.12), _span([np.array([p.y.low, p.y.high, 0.0]) for p in points], 0.08), height=HEIGHT + 40)
    parts, labels = axes.frame(), list[tuple[float, float]]()
    for colour, x in starts:
        parts.append(svg.element("circle", cx=float(axes.x(x)), cy=float(axes.y(0.0)), r=5, class_=f"dot hollow c{colour}"))
    for p in points:
        x = float(axes.x(p.x))
        parts.append(svg.element("line", x1=x, x2=x, y1=float(axes.y(p.y.low)), y2=float(axes.y(p.y.high)), class_=f"bar c{p.colour}"))
        parts.append(svg.element("circle", cx=x, cy=float(axes.y(p.y.mean)), r=6 if p.front else 4, class_=f"dot c{p.colour}"))
        if len(points) > 1:
            at = (x + 9, float(axes.y(p.y.mean)) + 4)
            while any(abs(at[0] - other[0]) < 11 and abs(at[1] - other[1]) < 12 for other in labels):  # of a run that came out alike
                at = (at[0] + 11, at[1])
            labels.append(at)
            parts.append(svg.text(p.key, x=at[0], y=at[1], class_="key"))
    return _svg(title, parts, HEIGHT + 40)


def window(count: int) -> int:
    """Points in the running mean of a curve: an odd number, about a tenth of them, at most 21."""
    return min(21, max(1, count // 10)) | 1


def short(value: float) -> str:
    """A number for an axis."""
    size = abs(value)
    text = f"{value / 1e6:g}M" if size >= 1e6 else f"{value / 1e3:g}k" if size >= 1e4 else f"{value:.4g}"
    return text.replace("-", "\u2212")


def _apart(places: Sequence[tuple[float, Line]], gap: float) -> list[tuple[float, Line]]:
    """The same places from top to bottom, each at least `gap` below the one before."""
    moved: list[tuple[float, Line]] = []
    for y, line in sorted(places, key=lambda place: place[0]):
        moved.append((max(y, moved[-1][0] + gap) if moved else y, line))
    return moved


def _svg(title: str, parts: Sequence[str], height: int) -> str:
    label = svg.element("title", svg.escape(title))
    return svg.element("svg", label, *parts, viewBox=f"0 0 {WIDTH} {height}", role="img", class_="chart")


def _pieces(axes: Axes, steps: np.ndarray, values: np.ndarray, class_: str) -> list[str]:
    """A line with gaps where there is no number."""
    there = np.isfinite(values)
    if not there.any():
        return []
    cuts = np.flatnonzero(np.diff(there.astype(int))) + 1
    runs = [part for part in np.split(np.arange(len(values)), cuts) if there[part[0]]]
    return [svg.polyline(axes.x(steps[part]), axes.y(values[part]), class_=class_) for part in runs]


def _binned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS points: means of stretches of equal length."""
    size = -(-len(steps) // MOST_POINTS)
    if size <= 1:
        return steps, values
    edges = np.arange(0, len(steps), size)
    return np.array([steps[e : e + size].mean() for e in edges]), np.array([_nanmean(values[e : e + size]) for e in edges])


def _mean(values: np.ndarray, size: int) -> np.ndarray:
    """Mean over a window of `size` points centred on each, fewer at the ends."""
    half = size // 2
    return np.array([_nanmean(values[max(0, i - half) : i + half + 1]) if np.isfinite(v) else np.nan for i, v in enumerate(values)])


def _nanmean(values: np.ndarray) -> float:
    there = values[np.isfinite(values)]
    return float(there.mean()) if len(there) else float("nan")


def _span(parts: Sequence[np.ndarray], pad: float) -> tuple[float, float]:
    """From the smallest to the largest finite value, widened by a share of it; never empty."""
    values = np.concatenate([np.asarray(part, np.float64).ravel() for part in parts])
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if low else (-1.0, 1.0)
    return low - pad * (high - low), high + pad * (high - low)
