"""Auxiliary rewards: scorers by name, and the weighted sum that UPO optimises, computed once before training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from upo.data.batch import Example
from upo.errors import ConfigError, DataError, did_you_mean
from upo.rewards.base import Answer, Scorer, TextScorer
from upo.rewards.column import Column
from upo.rewards.length import Length
from upo.rewards.python import Python
from upo.rewards.readability import Readability
from upo.train.reporter import Reporter, Silent

if TYPE_CHECKING:
    from upo.config import RewardConfig

SCORERS: dict[str, type[Scorer]] = {scorer.name: scorer for scorer in (Readability, Length, Column, Python)}

__all__ = ["SCORERS", "Answer", "Scorer", "TextScorer", "build_scorer", "score_examples", "unique_label", "validate_rewards"]

KEY = "objective.auxiliary.rewards"


def build_scorer(name: str, allow_code: bool = False, **options: Any) -> Scorer:
    """The scorer with these options, checked to work. Raises ConfigError for an unknown scorer or option, or code that is not allowed."""
    if name not in SCORERS:
        raise ConfigError(f'unknown scorer "{name}".{did_you_mean(name, SCORERS)}')
    known = {f.name: f.default for f in fields(SCORERS[name])}
    for option, value in options.items():
        if option not in known:
            there = did_you_mean(option, known) if known else " It has no options."
            raise ConfigError(f'scorer {name} has no option "{option}".{there}')
        if isinstance(known[option], float):
            try:
                options[option] = float(value) if not isinstance(value, bool) else float("nan")
            except (TypeError, ValueError):
                options[option] = float("nan")
            if math.isnan(options[option]):
                raise ConfigError(f"scorer {name}: {option} must be a number (got {value!r}).")
        elif not isinstance(value, str):
            raise ConfigError(f"scorer {name}: {option} must be text (got {value!r}).")
    if name == Python.name and not allow_code:
        raise ConfigError("scorer python runs code named by the configuration. If you trust it, add --allow-code to the command.")
    scorer = SCORERS[name](**options)
    scorer.check()
    return scorer


def validate_rewards(rewards: Sequence[RewardConfig], allow_code: bool = False, key: str = KEY) -> list[tuple[str, Scorer, float]]:
    """(label, scorer, weight) for each goal; labels are unique. Raises ConfigError, beginning with their key in the configuration, before
    any model is loaded."""
    built: list[tuple[str, Scorer, float]] = []
    for i, reward in enumerate(rewards):
        try:
            scorer = build_scorer(reward.scorer, allow_code, **(reward.model_extra or {}))
        except ConfigError as error:
            raise ConfigError(f"{key}.{i}: {error}") from None
        if not math.isfinite(reward.weight):
            raise ConfigError(f"{key}.{i}.weight: must be a finite number (got {reward.weight}).")
        built.append((unique_label(scorer, [label for label, _, _ in built]), scorer, reward.weight))
    return built


def unique_label(scorer: Scorer, taken: Sequence[str]) -> str:
    """The scorer's label, numbered where it is taken: length, length#2, ..."""
    numbered = (f"{scorer.label}#{n}" if n > 1 else scorer.label for n in range(1, len(taken) + 2))
    return next(label for label in numbered if label not in taken)


def score_examples(
    examples: Sequence[Example],
    rewards: Sequence[RewardConfig],
    *,
    allow_code: bool = False,
    reporter: Reporter | None = None,
    key: str = KEY,
) -> list[Example]:
    """The examples with `reward` = sum of weight * score per completion, and each score in `columns["reward/<label>"]`.

    Raises ConfigError for a scorer that cannot be used, DataError naming the row for a score that is missing or not a number.
    """
    reporter = reporter or Silent()
    goals = validate_rewards(rewards, allow_code, key)
    answers = [answer for example in examples for answer in _answers(example)]
    total = [0.0] * len(answers)
    scores: dict[str, list[float]] = {}
    for label, scorer, weight in goals:
        scores[label] = scorer.score(answers, reporter)
        total = [t + weight * value for t, value in zip(total, scores[label], strict=True)]
        _report(label, scores[label], weight, reporter)
    if len(goals) > 1 and answers and min(total) == max(total):
        reporter.warn(f"The total reward is {total[0]:.4g} for every completion, so it cannot steer the model.")
    scored, at = [], 0
    for example in examples:
        place = slice(at, at + len(example.completions))
        columns = {f"reward/{label}": tuple(values[place]) for label, values in scores.items()}
        scored.append(replace(example, reward=tuple(total[place]), columns={**example.columns, **columns}))
        at = place.stop
    return scored


def _answers(example: Example) -> list[Answer]:
    if len(example.texts) != len(example.completions):
        raise DataError(f"{example.origin}: the row has no text to score; only tokens are given.")
    columns = {**({} if 0 in example.labels else {"label": example.labels}), **example.columns}
    return [
        Answer(example.origin, example.prompt_text, text, {name: values[i] for name, values in columns.items()}) for i, text in enumerate(example.texts)
    ]


def _report(label: str, values: Sequence[float], weight: float, reporter: Reporter) -> None:
    if not values:
        return
    low, mean, high = min(values), sum(values) / len(values), max(values)
    reporter.info(
        f"Reward {label} (weight {weight:g}): mean {mean:.3f}, from {low:.3f} to {high:.3f}, over {len(values):,} completions."
    )
    if low == high:
        reporter.warn(
            f"Reward {label} is {low:.4g} for every completion, so it cannot steer the model. Check the data or choose another goal."
        )
