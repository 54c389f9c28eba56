"""A tiny learner on MLX and the gradient of its step. For tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from learner_runs import configure

import upo_mlx
from upo.data.batch import Batch


def make_learner(folder: Path, objective: object = "dpo", **sections: dict):
    return upo_mlx.load(configure(folder, objective, **sections))


def gradient(learner, batch: Batch, limit: int = 8192) -> tuple[dict[str, np.ndarray], object]:
    """What the optimizers are given, and the outcome; the weights stay."""
    grads: dict[str, np.ndarray] = {}

    class Recorder:
        moments: dict = {}  # noqa: RUF012

        def update(self, params, given, lr):
            grads.update({name: np.array(g) for name, g in given.items()})
            return params

    own = learner.info, learner.optimizer, learner.head_optimizer
    learner.info = replace(learner.info, micro_batch_tokens=limit)
    learner.optimizer = learner.head_optimizer = Recorder()
    try:
        outcome = learner.step(batch, 1e-3)
    finally:
        learner.info, learner.optimizer, learner.head_optimizer = own
    return grads, outcome
