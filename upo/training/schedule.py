"""The learning rate of every step, computed in float64 so that both backends are handed the same number."""

from __future__ import annotations

import math

from upo.config import OptimizerConfig


def lr_at(config: OptimizerConfig, step: int, total: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total`.

    Linear warm-up (step + 1) / warmup_steps, so that the first step already learns; after it the share p = (step - warmup) /
    (total - warmup) of the rest is done: constant 1, linear 1 - p, cosine (1 + cos(pi p)) / 2. The last step is above 0 too.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, total - config.warmup_steps))
    factor = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * factor
