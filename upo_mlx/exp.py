"""Exponentials on a Linux CPU, by NumPy: MLX computes them there one at a time, at 13 ns each, and NumPy in vectors, at 1 ns.

Half of a forward pass of a 135M model went into them. NumPy needs the numbers, so this holds where no gradient is traced.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from upo_mlx.device import mx, nn

Array = mx.array
_silu = nn.silu


def slow() -> bool:
    """Whether MLX's own exponentials are."""
    return sys.platform == "linux" and mx.default_device() == mx.cpu


@contextmanager
def quick_silu() -> Iterator[None]:
    """Inside the block, in which no gradient may be traced, `mlx.nn.silu`, the activation of most families, is computed by NumPy."""
    if not slow():
        yield
        return
    try:
        nn.silu = silu
        yield
    finally:
        nn.silu = _silu


def silu(x: Array) -> Array:
    """x / (1 + e^-x), for float32; MLX's own for other dtypes."""
    if x.dtype != mx.float32:
        return _silu(x)
    given = np.array(x, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):  # of very negative x, whose quotient is zero; of infinite x
        below = np.exp(-given)
        below += 1
        return mx.array(np.divide(given, below, out=below))


def log_sum_exp(logits: Array) -> Array:
    """[m, 1] over the last axis of float32 logits [m, V]. NumPy sums in pairs, which is exact enough for any vocabulary."""
    given = np.array(logits, copy=False)
    with np.errstate(invalid="ignore"):  # what is not finite stays so, and is found in the log-prob
        top = given.max(axis=-1, keepdims=True)
        exps = given - top
        return mx.array(top + np.log(np.exp(exps, out=exps).sum(axis=-1, keepdims=True)))
