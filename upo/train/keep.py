"""Which checkpoint is the best so far, by a metric of the held-out rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from upo.config import RunConfig
from upo.data.batch import Example
from upo.errors import ConfigError
from upo.losses import Objective

HIGHER = frozenset({"accuracy", "margin", "logp/chosen"})  # the others are losses: lower is better


def check_keep_best(config: RunConfig, objective: Objective, held_out: Sequence[Example]) -> None:
    """Raise ConfigError if `train.keep_best` names a metric that the evaluations will not have."""
    metric = config.train.keep_best
    if metric is None:
        return
    if not held_out or config.train.eval_every == 0:
        what = "train.eval_every is 0" if held_out else "there are no held-out rows (data.eval)"
        raise ConfigError(f"train.keep_best: {metric} is compared between evaluations during the run, and {what}. Give both, or leave it out.")
    there = {
        "loss/preference": bool(objective.preference),
        "loss/auxiliary": objective.auxiliary is not None,
        "accuracy": bool(objective.preference) and any(e.kind == "pair" for e in held_out),
        "margin": bool(objective.preference) and any(e.kind == "pair" for e in held_out),
        "logp/chosen": any(label > 0 for e in held_out for label in e.labels),
    }
    if not there.get(metric, True):
        possible = ", ".join(["loss", *(name for name, has in there.items() if has)])
        raise ConfigError(f"train.keep_best: this objective has no {metric} on these held-out rows. Possible: {possible}.")


def best_of(evaluations: Sequence[Mapping[str, Any]], metric: str | None) -> Mapping[str, Any] | None:
    """The evaluation with the best value, the earliest of equals; None without one. The one before training does not count."""
    if metric is None:
        return None
    sign = -1 if metric in HIGHER else 1
    valued = [line for line in evaluations if line["step"] > 0 and isinstance(line.get(metric), (int, float)) and math.isfinite(line[metric])]
    return min(valued, key=lambda line: (sign * line[metric], line["step"]), default=None)
