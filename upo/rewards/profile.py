"""What goals say about data before it is trained on: their spread, and how they agree with the preference and with one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from upo.data.rows import Row

BINS = 10
CLEAR = 2.0  # standard errors beyond which a goal is said to fight the preference
ALIKE = 0.9  # rank correlation beyond which two goals are one
SHOWN = 5  # conflicts


@dataclass(frozen=True)
class GoalProfile:
    """One goal over N completions, of which P pairs. Scores are those that training would add up, before their weight."""

    label: str
    weight: float
    completions: int
    mean: float
    deviation: float
    low: float
    high: float
    edges: tuple[float, ...]  # of the histogram, BINS + 1; two if all scores are equal
    counts: tuple[int, ...]
    preference: float | None  # Pearson correlation with the label (+1, -1) of the labelled completions; None if either is constant
    pairs: int
    agreeing: int  # pairs whose chosen completion is better, in the direction of the weight
    tied: int
    conflicts: int  # pairs whose rejected completion is better
    worst: tuple[tuple[str, float], ...]  # (row, how much better the rejected one is), the largest first


@dataclass(frozen=True)
class Profile:
    """The goals, their total where there are several, Spearman's correlation between each two, and what to look at."""

    goals: tuple[GoalProfile, ...]
    total: GoalProfile | None
    between: dict[str, dict[str, float | None]]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def profile(rows: Sequence[Row], scores: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> Profile:
    """`scores`: by goal, one number per completion in the order of the rows; `weights`: of each goal in the total reward."""
    goals = tuple(_goal(label, rows, np.asarray(values, np.float64), weights[label]) for label, values in scores.items())
    total = None
    if len(goals) > 1:
        total = _goal("total", rows, np.sum([weights[label] * np.asarray(values, np.float64) for label, values in scores.items()], axis=0), 1.0)
    between = {a: {b: _correlation(_ranks(scores[a]), _ranks(scores[b])) for b in scores if b != a} for a in scores}
    warnings = [text for goal in (*goals, *([total] if total else [])) for text in _goal_warnings(goal)]
    labels = list(scores)
    for i, a in enumerate(labels):
        for b in labels[i + 1 :]:
            r = between[a][b]
            if r is not None and abs(r) > ALIKE:
                against = r * weights[a] * weights[b] < 0
                what = "pull against each other: what one gains the other loses" if against else "say nearly the same; one of them is enough"
                warnings.append(f"{a} and {b} {what} (rank correlation {r:.2f}).")
    return Profile(goals, total, between, tuple(warnings))


def _goal(label: str, rows: Sequence[Row], values: np.ndarray, weight: float) -> GoalProfile:
    signs = np.array([sign for row in rows for sign in row.labels])
    starts = np.cumsum([0, *(len(row.completions) for row in rows)])
    pairs = [i for i, row in enumerate(rows) if row.kind == "pair"]
    better = np.array([values[starts[i]] - values[starts[i] + 1] for i in pairs]) * (1 if weight >= 0 else -1)
    order = np.argsort(better, kind="stable")[:SHOWN]
    constant = values.min() == values.max()
    counts, edges = ([len(values)], [values.min(), values.max()]) if constant else np.histogram(values, BINS)
    return GoalProfile(
        label=label,
        weight=weight,
        completions=len(values),
        mean=float(values.mean()),
        deviation=0.0 if constant else float(values.std()),
        low=float(values.min()),
        high=float(values.max()),
        edges=tuple(float(edge) for edge in edges),
        counts=tuple(int(count) for count in counts),
        preference=_correlation(values[signs != 0], signs[signs != 0]),
        pairs=len(pairs),
        agreeing=int((better > 0).sum()),
        tied=int((better == 0).sum()),
        conflicts=int((better < 0).sum()),
        worst=tuple((rows[pairs[i]].origin, float(-better[i])) for i in order if better[i] < 0),
    )


def _goal_warnings(goal: GoalProfile) -> list[str]:
    what = "The total reward" if goal.label == "total" else goal.label
    if goal.low == goal.high:
        return [f"{what} is {goal.low:.4g} for every completion, so it cannot steer the model. Check the data or choose another goal."]
    decided = goal.agreeing + goal.conflicts
    if decided and goal.conflicts - goal.agreeing > CLEAR * np.sqrt(decided):
        return [
            f"{what} fights the preference: it finds the rejected completion better in {goal.conflicts:,} pairs and the chosen one in {goal.agreeing:,}. "
            "Training trades one for the other; give it a small weight, or the opposite sign if that was meant."
        ]
    if not goal.pairs and goal.preference is not None and np.copysign(goal.preference, goal.preference * goal.weight) * np.sqrt(goal.completions) < -CLEAR:
        return [f"{what} fights the labels (correlation {goal.preference:.2f}): it is better where they say undesirable."]
    return []


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's; None where one of them is constant or there are fewer than two."""
    if len(a) < 2 or a.min() == a.max() or b.min() == b.max():
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    """From 0, the mean of their places for equal values."""
    _, inverse, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts + 1) / 2)[inverse])
