"""What the evaluations decide: which checkpoint is the best so far, and whether the run still gets better.

Both follow from the evaluation lines alone, so nothing about them is stored: a resumed run decides as if it had never stopped, and every
rank, having the same lines, decides alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from upo.config import RunConfig
from upo.data.batch import Example
from upo.errors import ConfigError
from upo.losses import Objective

HIGHER = frozenset({"accuracy", "margin", "logp/chosen", "goals"})  # is better; of the others of upo.config.WATCHED lower is
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """A number of the evaluation lines, and which way is better."""

    name: str
    higher: bool

    def of(self, line: Line) -> float | None:
        """Its value, the larger the better; None where the line has none, or it is not finite."""
        value = line.get(self.name)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        return float(value) if self.higher else -float(value)


@dataclass(frozen=True)
class Watch:
    """The metric by which the best checkpoint is kept, and the one that ends the run early. The evaluation before training counts for neither."""

    best: Metric | None = None
    stop: Metric | None = None
    patience: int = 1
    min_delta: float = 0.0

    def best_of(self, evaluations: Sequence[Line]) -> Line | None:
        """The evaluation with the best value, the earliest of equals; None without one."""
        if self.best is None:
            return None
        valued = [(value, line) for line in evaluations if line["step"] > 0 and (value := self.best.of(line)) is not None]
        return max(valued, key=lambda pair: (pair[0], -pair[1]["step"]), default=(0.0, None))[1]

    def stalled(self, evaluations: Sequence[Line]) -> bool:
        """Whether the last `patience` evaluations brought no value that is better by more than `min_delta` than the best before them.

        Evaluations without a value are passed over: a judge that was away says nothing about the model.
        """
        if self.stop is None:
            return False
        values = [value for line in sorted(evaluations, key=lambda line: line["step"]) if line["step"] > 0 and (value := self.stop.of(line)) is not None]
        best, since = -math.inf, 0
        for value in values:
            best, since = (value, 0) if value > best + self.min_delta else (best, since + 1)
        return since >= self.patience


def watch_of(config: RunConfig, objective: Objective, held_out: Sequence[Example], goals: Mapping[str, float] | None) -> Watch:
    """What `train.keep_best` and `train.early_stopping` ask for. `goals`: weight by label of those scored on sampled answers, None if none are sampled.

    Raises ConfigError for a metric that the evaluations will not have.
    """
    pairs, chosen = any(e.kind == "pair" for e in held_out), any(label > 0 for e in held_out for label in e.labels)
    there = {
        "loss": True,
        "loss/preference": bool(objective.preference),
        "loss/auxiliary": objective.auxiliary is not None,
        "accuracy": bool(objective.preference) and pairs,
        "margin": bool(objective.preference) and pairs,
        "logp/chosen": chosen,
        "perplexity": chosen,
        "kl": "reference" in objective.needs,
        "goals": bool(goals),
        **{f"goal/{label}": True for label in goals or {}},
    }

    def metric(key: str, name: str) -> Metric:
        if not held_out or config.train.eval_every == 0:
            what = "train.eval_every is 0" if held_out else "there are no held-out rows (data.eval)"
            raise ConfigError(f"{key}: {name} is compared between evaluations during the run, and {what}. Give both, or leave it out.")
        if not there.get(name):
            possible = ", ".join(known for known, has in there.items() if has)
            sampled = " Goals are scored on sampled answers where evaluation.prompts is above 0." if name.startswith("goal") and goals is None else ""
            raise ConfigError(f"{key}: this objective has no {name} on these held-out rows. Possible: {possible}.{sampled}")
        return Metric(name, (goals or {})[name.removeprefix("goal/")] >= 0 if name.startswith("goal/") else name in HIGHER)

    early = config.train.early_stopping
    return Watch(
        best=None if config.train.keep_best is None else metric("train.keep_best", config.train.keep_best),
        stop=None if early is None else metric("train.early_stopping.metric", early.metric),
        patience=1 if early is None else early.patience,
        min_delta=0.0 if early is None else early.min_delta,
    )
