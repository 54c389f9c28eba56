"""The weighted sum of goals that UPO optimises, computed once before training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from upo.data.batch import Example
from upo.data.rows import Row
from upo.data.text import Message, readable
from upo.errors import ConfigError, DataError
from upo.rewards.base import Answer, Scorer
from upo.rewards.normalise import Normaliser, fit
from upo.rewards.registry import build_scorer, unique_label
from upo.training.reporter import Reporter, Silent

if TYPE_CHECKING:
    from upo.config import RewardConfig

KEY = "objective.auxiliary.rewards"


@dataclass(frozen=True)
class Goal:
    """A scorer with its place in the total reward."""

    label: str
    scorer: Scorer
    weight: float
    normaliser: Normaliser

    def record(self) -> dict[str, Any]:
        """For the manifest."""
        options = json.loads(json.dumps(asdict(self.scorer)))
        scorer = {"scorer": self.scorer.name, "version": self.scorer.version, "options": options}
        return {"label": self.label, **scorer, "weight": self.weight, **self.normaliser.record()}


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


def score_examples(
    examples: Sequence[Example],
    rewards: Sequence[RewardConfig],
    *,
    fitted: Sequence[Goal] | None = None,
    allow_code: bool = False,
    reporter: Reporter | None = None,
    key: str = KEY,
) -> tuple[list[Example], list[Goal]]:
    """The examples with `reward` = sum of weight * normalised score per completion, and each score in `columns["reward/<label>"]`; and the
    goals, whose normalisation is that of `fitted`, or fitted on these examples.

    Raises ConfigError for a scorer that cannot be used, DataError naming the row for a score that is missing or not a number.
    """
    reporter = reporter or Silent()
    built = validate_rewards(rewards, allow_code, key)
    answers = [answer for example in examples for answer in _answers(example)]
    total = [0.0] * len(answers)
    scores: dict[str, list[float]] = {}
    goals: list[Goal] = []
    for i, (label, scorer, weight) in enumerate(built):
        scores[label] = scorer.score(answers, reporter)
        kind, clip = rewards[i].normalise, rewards[i].clip
        normaliser = fitted[i].normaliser if fitted is not None else fit(kind, clip, scores[label]) if answers else Normaliser("none", clip)
        goals.append(Goal(label, scorer, weight, normaliser))
        values = normaliser(scores[label])
        total = [t + weight * value for t, value in zip(total, values, strict=True)]
        _report(goals[-1], scores[label], values, reporter)
    if len(goals) > 1 and answers and min(total) == max(total):
        reporter.warn(f"The total reward is {total[0]:.4g} for every completion, so it cannot steer the model.")
    scored, at = [], 0
    for example in examples:
        place = slice(at, at + len(example.completions))
        columns = {f"reward/{label}": tuple(values[place]) for label, values in scores.items()}
        scored.append(replace(example, reward=tuple(total[place]), columns={**example.columns, **columns}))
        at = place.stop
    return scored, goals


def row_answers(row: Row) -> list[Answer]:
    """An answer per completion of a row that was read."""
    turns = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
    labels = {} if 0 in row.labels else {"label": row.labels}
    texts = [readable(text) for text in row.completions]
    return answers_of(row.origin, row.kind, readable(row.prompt), turns, texts, row.labels, {**labels, **row.columns})


def _answers(example: Example) -> list[Answer]:
    if len(example.texts) != len(example.completions):
        raise DataError(f"{example.origin}: the row has no text to score; only tokens are given.")
    columns = {**({} if 0 in example.labels else {"label": example.labels}), **example.columns}
    turns = example.prompt_turns or ({"role": "user", "content": example.prompt_text},)
    return answers_of(example.origin, example.kind, example.prompt_text, turns, example.texts, example.labels, columns)


def answers_of(
    origin: str,
    kind: str,
    prompt: str,
    turns: Sequence[Message],
    texts: Sequence[str],
    labels: Sequence[int],
    columns: Mapping[str, Sequence[float]],
) -> list[Answer]:
    """What scorers see of a row: an answer per completion. The chosen one is a pair's first, or the only one that is labelled good."""
    good = [text for text, label in zip(texts, labels, strict=True) if label > 0]
    chosen = good[0] if len(good) == 1 and kind != "unpaired" else None
    return [
        Answer(origin, prompt, text, {name: values[i] for name, values in columns.items()}, chosen, tuple(turns)) for i, text in enumerate(texts)
    ]


def _report(goal: Goal, scores: Sequence[float], values: Sequence[float], reporter: Reporter) -> None:
    if not values:
        return
    low, mean, high = min(scores), sum(scores) / len(scores), max(scores)
    kind, clip = goal.normaliser.kind, goal.normaliser.clip
    scaled = f"; {kind if kind != 'none' else 'clipped'}: {min(values):.3f} to {max(values):.3f}" if kind != "none" or clip else ""
    reporter.info(
        f"Reward {goal.label} (weight {goal.weight:g}): mean {mean:.3f}, from {low:.3f} to {high:.3f}, over {len(values):,} completions{scaled}."
    )
    if min(values) == max(values):
        reporter.warn(
            f"Reward {goal.label} is {values[0]:.4g} for every completion, so it cannot steer the model. Check the data or choose another goal."
        )
