"""Sampled answers before and after training, and what they say of the goals: RUN/eval.json, or what `upo quickstart` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upo.report.plain import clean, mapping, number

FILES = ("eval.json", "quickstart.json")  # the first that is there


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def direction(self, null: float = 0.0) -> str:
        """`rose`, `fell`, or `not shown` where the interval includes `null`."""
        return "rose" if self.low > null else "fell" if self.high < null else "not shown"


@dataclass(frozen=True)
class Measure:
    """One quantity before and after training; None where it was not measured."""

    before: float | None
    after: float | None
    change: Interval | None  # paired, over prompts or rows


@dataclass(frozen=True)
class Goal:
    """A scorer's mean over the answers."""

    measure: Measure
    weight: float | None  # in the objective; None if the run was not trained towards it

    def verdict(self) -> tuple[str, str]:
        """(what is shown, its tone): the tone is `good`, `bad`, or `plain` where nothing is shown or nothing was wanted."""
        change = self.measure.change
        if change is None:
            return "no interval", "plain"
        shown = change.direction()
        if shown == "not shown" or not self.weight:
            return shown, "plain"
        return shown, "good" if (shown == "rose") == (self.weight > 0) else "bad"


@dataclass(frozen=True)
class Answers:
    """Answers to one prompt."""

    prompt: str
    before: list[str]
    after: list[str]


@dataclass(frozen=True)
class WinRate:
    """How often the answer after training beats the one before; ties count one half."""

    judge: str
    rate: Interval


@dataclass(frozen=True)
class Evaluation:
    """What was measured on answers to `prompts` prompts, `samples` to each, and on held-out rows."""

    file: str
    step: int | None  # of the checkpoint that gave the answers after
    prompts: int | None
    samples: int | None
    rows: int | None
    goals: dict[str, Goal]
    measures: dict[str, Measure]  # of rows: accuracy, margin, kl, perplexity; of answers: words, repetition, empty, grade
    win_rate: WinRate | None
    answers: list[Answers]
    seconds: dict[str, float]


def read_evaluation(folder: Path, weights: Mapping[str, float] | None, notes: list[str]) -> Evaluation | None:
    """The newest kind there is; None without one. What cannot be read is noted and left out.

    `weights` are those of the goals the run was trained towards, by label; None where that is not known.
    """
    for name in FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            notes.append(f"{name} cannot be read ({clean(str(error))}) and is left out.")
            continue
        if isinstance(content, dict):
            return (_of_eval if name == "eval.json" else _of_quickstart)(name, content, weights)
        notes.append(f"{name} is not an object and is left out.")
    return None


def _of_eval(name: str, content: Mapping[str, Any], weights: Mapping[str, float] | None) -> Evaluation:
    measured = {key: content[key] for key in ("accuracy", "margin", "kl", "perplexity") if key in content}
    measured |= mapping(content.get("answers"))
    return Evaluation(
        file=name,
        step=_count(content.get("step")),
        prompts=_count(content.get("prompts")),
        samples=_count(content.get("samples_per_prompt")),
        rows=_count(content.get("rows")),
        goals={clean(goal): Goal(_measure(value), number(mapping(value).get("weight")) if weights is None else weights.get(goal)) for goal, value in mapping(content.get("goals")).items()},
        measures={clean(key): _measure(value) for key, value in measured.items()},
        win_rate=_win_rate(content.get("win_rate")),
        answers=_answers(content.get("samples")),
        seconds={},
    )


def _of_quickstart(name: str, content: Mapping[str, Any], weights: Mapping[str, float] | None) -> Evaluation:
    before, after = mapping(content.get("before")), mapping(content.get("after"))
    both: dict[str, Measure] = {key: Measure(number(before[key]), number(after.get(key)), None) for key in ("accuracy", "grade", "words", "repetition", "empty") if key in before}
    goal = Measure(number(before.get("reward")), number(after.get("reward")), _interval(content.get("reward_change")))
    return Evaluation(
        file=name,
        step=_count(content.get("steps")),
        prompts=_count(content.get("prompts")),
        samples=_count(content.get("samples")),
        rows=None,
        goals={"readability": Goal(goal, (weights or {}).get("readability"))},
        measures=both,
        win_rate=None,
        answers=_answers(content.get("answers")),
        seconds={clean(key): spent for key, value in mapping(content.get("seconds")).items() if (spent := number(value)) is not None},
    )


def _measure(found: Any) -> Measure:
    value = mapping(found)
    return Measure(number(value.get("before")), number(value.get("after")), _interval(value.get("change")))


def _interval(value: Any) -> Interval | None:
    mean, low, high = (number(mapping(value).get(key)) for key in ("mean", "low", "high"))
    return None if mean is None or low is None or high is None else Interval(mean, low, high)


def _win_rate(value: Any) -> WinRate | None:
    rate = _interval(value)
    return None if rate is None else WinRate(clean(str(mapping(value).get("judge", "not named"))), rate)


def _answers(value: Any) -> list[Answers]:
    items = value if isinstance(value, list) else []
    return [
        Answers(clean(item["prompt"]), _texts(item.get("before")), _texts(item.get("after")))
        for item in items
        if isinstance(item, dict) and isinstance(item.get("prompt"), str)
    ]


def _texts(value: Any) -> list[str]:
    return [clean(text) for text in value if isinstance(text, str)] if isinstance(value, list) else []


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None
