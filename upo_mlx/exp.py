"""Exponentials on a Linux CPU, of products and sums: MLX computes its own there one number at a time, 13 ns each, and these in vectors, 5 ns.

A third of a forward pass of a 135M model went into them. On other devices MLX's own are used.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from upo_mlx.device import mx, nn

Array = mx.array
_silu = nn.silu

# 2^f - 1 = f * (C[0] + C[1] f + ...) for |f| <= 1/2 to 2e-9, by least squares at Chebyshev's points, of the relative error.
C = (0.6931472055770994, 0.24022648462281168, 0.055503290351537955, 0.009618373251356692, 0.0013399848290623901, 0.00015370704815016116)
ROUND = 1.5 * 2.0**23  # added to a float32 it leaves the nearest integer in the last bits
BIAS, DIGITS = 127, 23  # of a float32's exponent, and the bits below it


def slow() -> bool:
    """Whether MLX's own exponentials are."""
    return sys.platform == "linux" and mx.default_device() == mx.cpu


def exp(x: Array) -> Array:
    """e^x of float32. Where MLX's own is slow, to a relative error of 1e-7 times 1 + |x|, and of x below -87 and above 87 as there."""
    return _exp2(x * (1 / math.log(2))) if slow() else mx.exp(x)


def _exp2(t: Array) -> Array:
    """2^t: the whole part of t goes into the exponent, the rest into a polynomial. What is no number stays none."""
    t = mx.minimum(mx.maximum(t, 1.0 - BIAS), BIAS - 1.0)
    rounded = t + ROUND
    f = t - (rounded - ROUND)
    power = C[-1] * f + C[-2]
    for c in reversed(C[:-2]):
        power = power * f + c
    whole = mx.left_shift(mx.view(rounded, mx.int32), DIGITS) + (BIAS << DIGITS)
    return (power * f + 1.0) * mx.view(whole, mx.float32)


def silu(x: Array) -> Array:
    """x / (1 + e^-x), for float32; MLX's own for other dtypes."""
    return _silu_with_slope(x)[0] if x.dtype == mx.float32 else _silu(x)


@mx.custom_function
def _silu_with_slope(x: Array) -> tuple[Array, Array]:
    """silu(x) and sigmoid(x), which its slope is made of."""
    sigmoid = 1.0 / (1.0 + _exp2(x * (-1 / math.log(2))))
    return x * sigmoid, sigmoid


@_silu_with_slope.vjp
def _backward(x: Array, cotangents: tuple[Array, Array], outputs: tuple[Array, Array]) -> Array:
    sigmoid = outputs[1]
    return cotangents[0] * (sigmoid * (1.0 + x * (1.0 - sigmoid)))


@contextmanager
def quick_silu() -> Iterator[None]:
    """Inside the block `mlx.nn.silu`, the activation of most families, is `silu` where MLX's own is slow."""
    if not slow():
        yield
        return
    before = nn.silu
    try:
        nn.silu = silu
        yield
    finally:
        nn.silu = before
