"""Which rows each optimizer step takes: a function of the seed and the step, so that a resumed run needs no other state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from upo.random import permutation

if TYPE_CHECKING:
    from upo.config import TrainConfig


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """[n] int64: the order of n rows in an epoch, from 0."""
    return permutation(n, seed, "order", epoch)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Steps that n rows make; the last one may be short."""
    return -(-n // batch_size)


def total_steps(train: TrainConfig, n: int) -> int:
    """Optimizer steps of the whole run over n rows: `steps` if given, else `epochs`, a part of an epoch rounded up to a whole step."""
    if train.steps is not None:
        return train.steps
    whole, part = divmod(train.epochs, 1.0)
    each = steps_per_epoch(n, train.batch_size)
    return int(whole) * each + math.ceil(round(part * each, 6))  # rounded first: 0.7 of 10 steps is 7, not 8


def step_rows(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """[batch_size or fewer] int64: the rows of optimizer step `step`, from 0. A step holds rows of one epoch only."""
    epoch, index = divmod(step, steps_per_epoch(n, batch_size))
    return epoch_order(n, seed, epoch)[index * batch_size : (index + 1) * batch_size]
