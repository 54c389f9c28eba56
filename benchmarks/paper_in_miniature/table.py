"""The tables, from what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from harness.tables import table
from paper_in_miniature.intervals import difference
from paper_in_miniature.measure import OTHER_READABILITY, OTHER_SAFETY, READABILITY, SAFETY
from paper_in_miniature.methods import METHODS
from paper_in_miniature.paper import OVERHEAD, PAPER

NONE = "–"
BASE = "base"
LABELS = {
    READABILITY: READABILITY,
    SAFETY: f"clean ({SAFETY})",
    OTHER_READABILITY: f"{OTHER_READABILITY}, not trained on",
    OTHER_SAFETY: f"{OTHER_SAFETY}, not trained on",
}
COMPARED = (
    ("R", "R, the goals together", 3),
    *((name, label, 3) for name, label in LABELS.items()),
    ("violations/top/0.001", "violations, most unsafe 20 %", 1),
    ("violations/all/0.001", "violations, all prompts", 1),
    ("violations/all/0.1", "violations by more than 0.1, all prompts", 1),
    ("accuracy", "preference accuracy", 3),
    ("words", "words per answer", 1),
)
PER_CENT = ("violations/", "repetition", "empty")


@dataclass(frozen=True)
class Found:
    """A method's runs."""

    values: Mapping[str, np.ndarray]  # name -> [seeds, prompts]
    seeds: tuple[int, ...]
    steps: Mapping[int, Sequence[float]] = field(default_factory=dict)  # seed -> seconds of each step; empty: nothing was trained
    alone: bool = True  # whether no other run trained beside these

    def mean(self, name: str) -> float:
        """Over seeds and prompts, per cent for shares."""
        return float(np.nanmean(self.values[name])) * (100 if name.startswith(PER_CENT) else 1)

    @property
    def step_s(self) -> float | None:
        """Seconds per step, the median."""
        seconds = [s for steps in self.steps.values() for s in steps]
        return statistics.median(seconds) if seconds else None

    def of(self, seeds: Sequence[int], name: str) -> np.ndarray:
        return self.values[name][[self.seeds.index(seed) for seed in seeds]]


def title(name: str) -> str:
    return METHODS[name].title if name in METHODS else "base model"


def methods_table(found: Mapping[str, Found], failed: Mapping[str, str]) -> str:
    """One line per method; those with one seed are marked with a star, and a step's time that was taken beside other runs with a tilde."""
    columns = (
        "method", "R", *LABELS.values(), "grade", "violations, %: all", "by > 0.1", "unsafe 20 %", "accuracy", "words",
        "of chosen", "repetition, %", "empty, %", "s/step", "over KTO",
    )  # fmt: skip
    kto = found.get("kto")
    lines: list[tuple[str, ...]] = []
    for name, runs in found.items():
        shown = [f"{runs.mean(key):.3f}" for key in ("R", *LABELS)]
        shown += [f"{runs.mean(key):.1f}" for key in ("grade", "violations/all/0.001", "violations/all/0.1", "violations/top/0.001")]
        shown += [f"{runs.mean('accuracy'):.3f}", f"{runs.mean('words'):.1f}", f"{runs.mean('words') / runs.mean('words/chosen'):.2f}"]
        shown += [f"{runs.mean(key):.1f}" for key in ("repetition", "empty")]
        shown += [NONE if runs.step_s is None else f"{'' if runs.alone else '~'}{runs.step_s:.3g}", _overhead(runs, kto)]
        lines.append((title(name) + ("*" if len(runs.seeds) == 1 else ""), *shown))
    lines += [(f"{title(name)}: FAILED", *[NONE] * (len(columns) - 1)) for name in failed if name not in found]
    return table(columns, lines)


def intervals_table(found: Mapping[str, Found], ours: str = "upo") -> str:
    """A way of UPO less KTO, DPO and the base model, on the seeds that both have; empty where there is nothing to compare."""
    others = [name for name in ("kto", "dpo", BASE) if name in found]
    if ours not in found or not others:
        return ""
    lines = []
    for key, label, digits in COMPARED:
        cells = []
        for name in others:
            seeds = [seed for seed in found[ours].seeds if seed in found[name].seeds]
            cells.append(_interval(found[ours].of(seeds, key), found[name].of(seeds, key), 100 if key.startswith(PER_CENT) else 1, digits) if seeds else NONE)
        lines.append((label + (", points" if key.startswith(PER_CENT) else ""), *cells))
    return table(("difference, 95 % interval", *(f"{title(ours)} - {title(name)}" for name in others)), lines)


def paper_table(found: Mapping[str, Found]) -> str:
    """UPO as a multiple of each other method, in the paper and here; empty without UPO."""
    if "upo" not in found:
        return ""
    ours, lines = found["upo"], []
    for name, there in PAPER.items():
        if name == "upo" or name not in found:
            continue
        here, top = found[name], "violations/top/0.001"
        lines.append((
            title(name) + ("*" if len(here.seeds) == 1 else ""),
            f"{PAPER['upo'].r1:.2f} / {there.r1:.2f} = {PAPER['upo'].r1 / there.r1:.2f}",
            _ratio(ours.mean(READABILITY), here.mean(READABILITY), 3),
            f"{PAPER['upo'].violations:.1f} / {there.violations:.1f} = {PAPER['upo'].violations / there.violations:.2f}",
            _ratio(ours.mean(top), here.mean(top), 1),
            f"{PAPER['upo'].grade - there.grade:+.2f}",
            f"{ours.mean('grade') - here.mean('grade'):+.2f}",
        ))  # fmt: skip
    columns = ("UPO / method", "R1, paper", "R1, here", "violations, paper", "violations, here", "grade, paper", "grade, here")
    return table(columns, lines) + f"\nA step of UPO over one of KTO: at most {OVERHEAD} % in the paper, {_overhead(ours, found.get('kto'))} here.\n"


def _interval(ours: np.ndarray, theirs: np.ndarray, times: int, digits: int) -> str:
    change = difference(ours * times, theirs * times)
    return f"{change.mean:+.{digits}f} [{change.low:+.{digits}f}, {change.high:+.{digits}f}]"


def _ratio(ours: float, theirs: float, digits: int) -> str:
    return f"{ours:.{digits}f} / {theirs:.{digits}f} = " + (f"{ours / theirs:.2f}" if theirs else NONE)


def _overhead(runs: Found, kto: Found | None) -> str:
    """Step by step with the KTO run of the same seed, which had the same rows in the same order; the median."""
    if kto is None or not (runs.alone and kto.alone):
        return NONE
    ratios = [a / b for seed in runs.steps if seed in kto.steps for a, b in zip(runs.steps[seed], kto.steps[seed], strict=True)]
    return f"{100 * (statistics.median(ratios) - 1):+.1f} %" if ratios else NONE
