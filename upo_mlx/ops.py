"""The loss specification in MLX. Every choice below keeps the contract of `upo.ops` at ties, zeros and large numbers."""

from __future__ import annotations

from math import log

import mlx.core as mx

from upo.ops import Array


class MlxOps:
    """`Ops` on float32 arrays of any device; traces under `mx.compile`."""

    name = "mlx"

    def exp(self, x: Array) -> Array:
        return mx.exp(x)

    def log(self, x: Array) -> Array:
        return mx.log(x)

    def log_sigmoid(self, x: Array) -> Array:
        return -mx.logaddexp(-x, mx.array(0.0, x.dtype))  # the other order of arguments loses the gradient from x = 18 on

    def sigmoid(self, x: Array) -> Array:
        return mx.sigmoid(x)

    def log1mexp(self, x: Array) -> Array:
        # Each branch is given a harmless input where the other one is taken: its infinite slope times 0 would be NaN.
        near = x > -log(2)
        small = mx.log(0.0 - mx.expm1(mx.where(near, x, -1.0)))
        return mx.where(near, small, mx.log1p(-mx.exp(mx.where(near, -1.0, x))))

    def relu(self, x: Array) -> Array:
        return mx.maximum(x, 0.0)

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        return mx.where(condition, x, y)

    def sum(self, x: Array, axis: int | None = None) -> Array:
        if x.size == 0:  # MLX 0.32 may run for ever over an empty array on the CPU
            return mx.zeros([n for k, n in enumerate(x.shape) if axis is not None and k != axis % x.ndim], dtype=x.dtype)
        return mx.sum(x, axis=axis)

    def logsumexp(self, x: Array, axis: int | None = None) -> Array:
        return mx.logsumexp(x, axis=axis)

    def stop_gradient(self, x: Array) -> Array:
        return mx.stop_gradient(x)

    def take(self, x: Array, index: Array) -> Array:
        return mx.take(x, index, axis=0)

    def argsort_stable(self, x: Array) -> Array:
        # MLX does not promise a stable sort on every device, so each element's rank is counted and there are no ties left to sort.
        place = mx.arange(x.shape[0])
        before = (x[None, :] < x[:, None]) | ((x[None, :] == x[:, None]) & (place[None, :] < place[:, None]))
        return mx.stop_gradient(mx.argsort(mx.sum(before.astype(mx.int32), axis=1)))  # else `take` refuses the indices under a gradient

    def segment_sum(self, x: Array, segment: Array, count: int) -> Array:
        return mx.zeros(count, x.dtype).at[segment].add(x)

    def segment_logsumexp(self, x: Array, segment: Array, count: int) -> Array:
        top = mx.full(count, -mx.inf, x.dtype).at[segment].maximum(mx.stop_gradient(x))
        top = mx.where(mx.isfinite(top), top, 0.0)
        return mx.log(self.segment_sum(mx.exp(x - mx.take(top, segment)), segment, count)) + top

    def reverse_scan(self, x: Array, decay: Array) -> Array:
        # Doubling: after the k-th round x[t] holds the sum over the next 2^k terms and decay[t] their product.
        decay, reach = mx.stop_gradient(decay), 1
        while reach < x.shape[0]:
            zeros = mx.zeros(reach, x.dtype)
            x = x + decay * mx.concatenate([x[reach:], zeros])
            decay = decay * mx.concatenate([decay[reach:], zeros])
            reach *= 2
        return x


ops = MlxOps()
