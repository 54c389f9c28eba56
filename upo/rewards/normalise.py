"""Bringing the scores of a goal onto a common scale: fitted on the training rows, saved with the run, the same for held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

KNOTS = 1001  # of the quantile function: below that it is exact for the scores it was fitted on


@dataclass(frozen=True)
class Normaliser:
    """`none`: the score as it is. `zscore`: (score - mean) / standard deviation, of the population; 0 where all scores are equal.
    `quantile`: the share of training scores below this one, plus half of those equal to it; in between it is interpolated.

    Afterwards, with `clip`, what lies outside is set to the nearer bound.
    """

    kind: str = "none"
    clip: tuple[float, float] | None = None
    numbers: tuple[tuple[float, ...], ...] = ()  # zscore: ((mean, deviation),); quantile: (scores, their quantiles)

    def __call__(self, scores: Sequence[float]) -> list[float]:
        values = np.asarray(scores, np.float64)
        if self.kind == "zscore":
            ((mean, deviation),) = self.numbers
            values = (values - mean) / deviation if deviation > 0 else np.zeros_like(values)
        elif self.kind == "quantile":
            values = np.interp(values, np.array(self.numbers[0]), np.array(self.numbers[1]))
        if self.clip is not None:
            values = np.clip(values, *self.clip)
        return [float(value) for value in values]

    def record(self) -> dict[str, Any]:
        """For the manifest: enough to do the same again."""
        names = {"zscore": ("mean_and_deviation",), "quantile": ("scores", "quantiles")}.get(self.kind, ())
        return {"normalise": self.kind, "clip": self.clip and list(self.clip), **{n: list(v) for n, v in zip(names, self.numbers, strict=True)}}


def fit(kind: str, clip: tuple[float, float] | None, scores: Sequence[float]) -> Normaliser:
    """The normaliser of this kind for these scores, at least one."""
    values = np.asarray(scores, np.float64)
    numbers: tuple[tuple[float, ...], ...] = ()
    if kind == "zscore":
        spread = float(values.std()) if values.min() < values.max() else 0.0  # equal numbers have a deviation of rounding
        numbers = ((float(values.mean()), spread),)
    elif kind == "quantile":
        different, counts = np.unique(values, return_counts=True)
        ranks = (np.cumsum(counts) - counts / 2) / len(values)
        if len(different) > KNOTS:
            kept = np.unique(np.linspace(0, len(different) - 1, KNOTS).round().astype(int))
            different, ranks = different[kept], ranks[kept]
        numbers = (tuple(different.tolist()), tuple(ranks.tolist()))
    return Normaliser(kind, clip, numbers)
