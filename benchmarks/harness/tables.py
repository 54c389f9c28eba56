"""Medians, ratios and Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.runs import Run


@dataclass(frozen=True)
class Spread:
    """The smallest, middle and largest of some numbers."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})" if self.low != self.high else f"{self.median:.2f}"


def spread(numbers: Sequence[float]) -> Spread:
    return Spread(min(numbers), statistics.median(numbers), max(numbers))


def ratios(ours: Sequence[Run], others: Sequence[Run], of: Callable[[Run], float]) -> Spread:
    """`of` ours divided by `of` theirs, repeat by repeat: neighbours in time, so that a slow minute of the machine hits both."""
    return spread([of(a) / of(b) for a, b in zip(ours, others, strict=True)])


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown; the first column is text, the others numbers."""
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    lines += [f"| {' | '.join('' if cell is None else str(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def of_runs(runs: Sequence[Run], of: Callable[[Run], float | None], form: str = ".3g") -> str:
    """The median of a number over the runs of a contender; a dash where it is not known."""
    found = [value for run in runs if (value := of(run)) is not None]
    return format(statistics.median(found), form) if found else "–"
