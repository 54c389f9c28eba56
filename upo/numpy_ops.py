"""The loss specification in NumPy: float64, forward only. For metrics, evaluation and tests; no framework needed."""

from __future__ import annotations

from math import log

import numpy as np

from upo.ops import Array


class NumpyOps:
    """`Ops` without gradients, so `stop_gradient` is the identity. Overflow gives inf and no warning, as in the frameworks."""

    name = "numpy"

    @np.errstate(all="ignore")
    def exp(self, x: Array) -> Array:
        return np.exp(_float(x))

    @np.errstate(all="ignore")
    def log(self, x: Array) -> Array:
        return np.log(_float(x))

    @np.errstate(all="ignore")
    def log_sigmoid(self, x: Array) -> Array:
        return -np.logaddexp(0.0, -_float(x))

    @np.errstate(all="ignore")
    def sigmoid(self, x: Array) -> Array:
        return np.exp(-np.logaddexp(0.0, -_float(x)))

    @np.errstate(all="ignore")
    def log1mexp(self, x: Array) -> Array:
        x = _float(x)
        return np.where(x > -log(2), np.log(0.0 - np.expm1(x)), np.log1p(-np.exp(x)))

    def relu(self, x: Array) -> Array:
        return np.maximum(_float(x), 0.0)

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        return np.where(condition, _float(x), _float(y))

    def sum(self, x: Array, axis: int | None = None) -> Array:
        return np.sum(_float(x), axis=axis)

    @np.errstate(all="ignore")
    def logsumexp(self, x: Array, axis: int | None = None) -> Array:
        x = _float(x)
        return np.logaddexp.reduce(x.ravel()) if axis is None else np.logaddexp.reduce(x, axis=axis)

    def stop_gradient(self, x: Array) -> Array:
        return x

    def take(self, x: Array, index: Array) -> Array:
        return np.take(x, index, axis=0)

    def argsort_stable(self, x: Array) -> Array:
        return np.argsort(x, kind="stable")

    def segment_sum(self, x: Array, segment: Array, count: int) -> Array:
        return np.bincount(segment, weights=_float(x), minlength=count)

    @np.errstate(all="ignore")
    def segment_logsumexp(self, x: Array, segment: Array, count: int) -> Array:
        out = np.full(count, -np.inf)
        np.logaddexp.at(out, segment, _float(x))
        return out

    def reverse_scan(self, x: Array, decay: Array) -> Array:
        out, following = np.zeros(len(x)), 0.0
        for t in range(len(x) - 1, -1, -1):
            out[t] = following = x[t] + decay[t] * following
        return out


def _float(x: Array) -> Array:
    return np.asarray(x, np.float64)


ops = NumpyOps()
