"""The loss specification in PyTorch. Every choice below keeps the contract of `upo.ops` at ties, zeros and large numbers."""

from __future__ import annotations

from math import log

import torch
from torch.nn import functional as F

from upo.ops import Array


class TorchOps:
    """`Ops` on tensors of any device; traces under `torch.compile(fullgraph=True)`."""

    name = "torch"

    def exp(self, x: Array) -> Array:
        return torch.exp(x)

    def log(self, x: Array) -> Array:
        return torch.log(x)

    def log_sigmoid(self, x: Array) -> Array:
        return F.logsigmoid(x)

    def sigmoid(self, x: Array) -> Array:
        return torch.sigmoid(x)

    def log1mexp(self, x: Array) -> Array:
        # Each branch is given a harmless input where the other one is taken: its infinite slope times 0 would be NaN.
        near = x > -log(2)
        small = torch.log(0.0 - torch.expm1(torch.where(near, x, -1.0)))
        return torch.where(near, small, torch.log1p(-torch.exp(torch.where(near, -1.0, x))))

    def relu(self, x: Array) -> Array:
        return torch.relu(x)  # maximum(x, 0) has slope 0.5 at 0

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        return torch.where(condition, x, y)

    def sum(self, x: Array, axis: int | None = None) -> Array:
        return torch.sum(x, dim=axis)

    def logsumexp(self, x: Array, axis: int | None = None) -> Array:
        return torch.logsumexp(x.reshape(-1), 0) if axis is None else torch.logsumexp(x, axis)

    def stop_gradient(self, x: Array) -> Array:
        return x.detach()

    def take(self, x: Array, index: Array) -> Array:
        return x[index]

    def argsort_stable(self, x: Array) -> Array:
        return torch.argsort(x, stable=True)

    def segment_sum(self, x: Array, segment: Array, count: int) -> Array:
        # index_put sums in a fixed order on CUDA, where index_add does not.
        return x.new_zeros(count).index_put((segment,), x, accumulate=True)

    def segment_logsumexp(self, x: Array, segment: Array, count: int) -> Array:
        constant = x.detach()
        top = constant.new_full((count,), -torch.inf).scatter_reduce(0, segment, constant, "amax")
        top = torch.where(torch.isfinite(top), top, 0.0)
        return torch.log(self.segment_sum(torch.exp(x - top[segment]), segment, count)) + top

    def reverse_scan(self, x: Array, decay: Array) -> Array:
        # Doubling: after the k-th round x[t] holds the sum over the next 2^k terms and decay[t] their product.
        decay, reach = decay.detach(), 1
        while reach < len(x):
            zeros = x.new_zeros(reach)
            x = x + decay * torch.cat([x[reach:], zeros])
            decay = decay * torch.cat([decay[reach:], zeros])
            reach *= 2
        return x


ops = TorchOps()
