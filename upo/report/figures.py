"""Which figures a report has: goals with their intervals, trade-offs, curves of every metric that the runs logged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from markupsafe import Markup

from upo.report import charts, facts
from upo.report.charts import Line, Point
from upo.report.plain import clean, number
from upo.report.read import Told
from upo.training.metrics import NAMES

MAIN = ("loss", "accuracy", "margin", "kl")  # curves in sight; the others are folded away
SAMPLED = "mean score of this goal on answers sampled to held-out prompts while it trained"
SKIPPED = {"step", "eval", "epoch", "seconds"}


def key(index: int) -> str:
    """A, B, ... of a run; numbers after Z."""
    return chr(65 + index) if index < 26 else str(index + 1)


def colour(index: int) -> int:
    return index % charts.COLOURS


def goals(runs: Sequence[Told]) -> list[dict[str, Any]]:
    """For each goal, the change in every run that measured it."""
    names = list(dict.fromkeys(name for run in runs if run.evaluation for name in run.evaluation.goals))
    found = []
    for name in names:
        rows = [
            (key(i), colour(i), goal.measure.change)
            for i, run in enumerate(runs)
            if run.evaluation and (goal := run.evaluation.goals.get(name)) is not None and goal.measure.change is not None
        ]
        if rows:
            found.append({"name": name, "chart": Markup(charts.intervals(f"Change of {name} with its 95 % interval", rows))})
    return found


def tradeoffs(runs: Sequence[Told]) -> list[dict[str, Any]]:
    """For each goal, its change against the preference accuracy after training; which runs no other one beats in both."""
    found = []
    for name in dict.fromkeys(name for run in runs if run.evaluation for name in run.evaluation.goals):
        points: list[Point] = []
        starts: dict[float, int] = {}  # accuracy before training -> colour
        wanted: list[float] = []
        for i, run in enumerate(runs):
            goal = run.evaluation.goals.get(name) if run.evaluation else None
            before, after = facts.accuracy(run)
            if goal is None or goal.measure.change is None or after is None:
                continue
            points.append(Point(key(i), colour(i), after, goal.measure.change))
            wanted.append(-1.0 if goal.weight is not None and goal.weight < 0 else 1.0)
            if before is not None:
                starts.setdefault(before, colour(i))
        if not points:
            continue
        front = _front([(p.x, sign * p.y.mean) for p, sign in zip(points, wanted, strict=True)])
        points = [replace(p, front=f) for p, f in zip(points, front, strict=True)]
        chart = charts.tradeoff(f"Change of {name} against preference accuracy", points, [(c, x) for x, c in starts.items()])
        best = [p.key for p in points if p.front]
        found.append({"name": name, "chart": Markup(chart), "front": best if len(points) > 1 else [], "less": wanted[0] < 0})
    return found


def curves(runs: Sequence[Told]) -> list[dict[str, Any]]:
    """Every metric that is logged: goals on sampled answers, the main ones, the others (`main` is False)."""
    there = dict.fromkeys(clean(name) for run in runs for record in (*run.steps, *run.evals) for name, value in record.items() if number(value) is not None)
    main = [*(n for n in there if n.startswith("goal/")), *(n for n in MAIN if n in there)]
    names = [*main, *(n for n in NAMES if n in there and n not in main), *(n for n in there if n not in NAMES and n not in main)]
    found = []
    for name in names:
        if name in SKIPPED:
            continue
        lines = [_line(run, i, name) for i, run in enumerate(runs)]
        lines = [line for line in lines if np.isfinite(line.values).any() or np.isfinite(line.evals).any()]
        if lines:
            points = max(len(line.values) for line in lines)
            found.append(
                {
                    "name": name,
                    "about": NAMES.get(name, SAMPLED if name.startswith("goal/") else ""),
                    "main": name in main,
                    "window": charts.window(min(points, charts.MOST_POINTS)),
                    "chart": Markup(charts.curves(f"{name} over the optimizer steps", lines)),
                    "held_out": any(np.isfinite(line.evals).any() for line in lines),
                    "ends": [(line.key, line.colour, _ends(line)) for line in lines],
                }
            )
    return found


def _line(run: Told, index: int, name: str) -> Line:
    steps, evals = run.steps, run.evals
    return Line(
        key(index),
        colour(index),
        np.array([r["step"] for r in steps], np.float64),
        np.array([_or_nan(r.get(name)) for r in steps], np.float64),
        np.array([r["step"] for r in evals], np.float64),
        np.array([_or_nan(r.get(name)) for r in evals], np.float64),
    )


def _ends(line: Line) -> str:
    """The first and the last value, of held-out rows where there are any."""
    values = [v for v in (line.evals if np.isfinite(line.evals).any() else line.values) if np.isfinite(v)]
    return f"{charts.short(values[0])} \u2192 {charts.short(values[-1])}"


def _or_nan(value: Any) -> float:
    found = number(value)
    return float("nan") if found is None else found


def _front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether no other point is at least as good in both and better in one; larger is better."""
    return [not any(o != p and o[0] >= p[0] and o[1] >= p[1] for o in points) for p in points]
