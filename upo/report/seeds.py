"""Runs that differ in their seed alone, taken together: means, with an interval over prompts and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, lgamma, pi, sqrt

import numpy as np

from upo.report import facts
from upo.report.evaluation import Goal, Interval, Measure
from upo.report.plain import mapping, number
from upo.report.read import Told
from upo.training.identity import flatten

NORMAL = 1.96  # half a 95 % interval in standard errors, where much was seen


@dataclass(frozen=True)
class Span:
    """A mean over two seeds or more, and the smallest and largest value among them."""

    mean: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class Pool:
    """Finished runs of one configuration, each with a seed of its own."""

    runs: list[int]  # places among all runs
    goals: dict[str, Goal | Span]  # with an interval of the change if it has one in every run; else the spread of the runs that measured it
    before: float | None  # preference accuracy on held-out pairs, mean
    after: Span | None


def pools(runs: Sequence[Told]) -> list[Pool]:
    """Every set of two or more runs that differ in `train.seed` alone; of runs with the same seed the first."""
    groups: dict[str, dict[int, int]] = {}
    for i, run in enumerate(runs):
        if run.config is not None and run.finished:
            groups.setdefault(_all_but_the_seed(run), {}).setdefault(run.config.train.seed, i)
    return [_pool(runs, list(group.values())) for group in groups.values() if len(group) > 1]


def _all_but_the_seed(run: Told) -> str:
    """Configuration, model and, unless the seed chooses the held-out rows, data."""
    assert run.config is not None
    config, identity = flatten(run.config.model_dump(mode="json")), mapping(run.manifest.get("identity"))
    names = ["model"] if number(run.config.data.eval) is not None else ["model", "data.train", "data.eval"]
    return repr((sorted((key, value) for key, value in config.items() if key != "train.seed"), [identity.get(name) for name in names]))


def _pool(runs: Sequence[Told], places: list[int]) -> Pool:
    members = [runs[i] for i in places]
    accuracies = [facts.accuracy(run) for run in members]
    before = [a for a, _ in accuracies if a is not None]
    names = dict.fromkeys(name for run in members if run.evaluation for name in run.evaluation.goals)
    return Pool(places, {name: found for name in names if (found := _goal(name, members)) is not None}, float(np.mean(before)) if before else None, _span([a for _, a in accuracies]))


def _goal(name: str, runs: Sequence[Told]) -> Goal | Span | None:
    goals = [run.evaluation.goals[name] for run in runs if run.evaluation and name in run.evaluation.goals]
    changes = [goal.measure.change for goal in goals if goal.measure.change is not None]
    if len(changes) == len(runs):
        asked = [[answer.prompt for answer in run.evaluation.answers] for run in runs if run.evaluation]
        same = bool(asked[0]) and all(prompts == asked[0] for prompts in asked)
        return Goal(Measure(None, None, over_seeds(changes, len(asked[0]) if same else None)), goals[0].weight)
    return _span([_moved(goal.measure) for goal in goals])


def _moved(measure: Measure) -> float | None:
    if measure.change is not None:
        return measure.change.mean
    return None if measure.before is None or measure.after is None else measure.after - measure.before


def _span(values: Sequence[float | None]) -> Span | None:
    found = [value for value in values if value is not None]
    return Span(float(np.mean(found)), min(found), max(found), len(found)) if len(found) > 1 else None


def over_seeds(changes: Sequence[Interval], prompts: int | None) -> Interval:
    """The mean change with its 95 % interval over seeds and, where all seeds were asked the same, over `prompts` prompts; None: each its own.

    The variance of the mean has two parts, that of the seeds' means divided by their number, and, which no number of seeds makes smaller,
    that of the prompts: the mean of the squared standard errors, which the widths of the intervals give. Where each seed has prompts of its
    own, their part is in the first already. Student's t with the degrees of freedom of Welch (1947) and Satterthwaite (1946), as few seeds
    say little about their spread: two that differ give a wide interval. Errs on the wide side: chance in single answers counts in both.
    """
    means = np.array([change.mean for change in changes])
    mean, seeds = float(means.mean()), float(means.var(ddof=1)) / len(means)
    asked = 0.0 if prompts is None else float(np.mean([((change.high - change.low) / (2 * NORMAL)) ** 2 for change in changes]))
    if seeds + asked == 0:
        return Interval(mean, mean, mean)
    freedom = (seeds + asked) ** 2 / (seeds**2 / (len(means) - 1) + asked**2 / max((prompts or 0) - 1, 1))
    half = student(freedom) * sqrt(seeds + asked)
    return Interval(mean, mean - half, mean + half)


def student(freedom: float) -> float:
    """The 97.5 % quantile of Student's t, for one degree of freedom and more, by adding up its density."""
    x = np.linspace(0.0, 13.0, 100_001)  # of one degree it is 12.7
    density = exp(lgamma((freedom + 1) / 2) - lgamma(freedom / 2)) / sqrt(freedom * pi) * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    area = np.cumsum((density[1:] + density[:-1]) / 2) * (x[1] - x[0])
    return float(np.interp(0.475, area, x[1:]))
