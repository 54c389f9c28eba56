"""LoRA layers: a frozen product and a low-rank one as one node for autograd, without a pass over the outputs for each operation between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear


class LowRank(nn.Module):
    """One LoRA matrix: a float32 master, multiplied in the dtype of its input. PEFT's own layer computes in the master's dtype instead."""

    def __init__(self, array: np.ndarray, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(np.array(array, np.float32)).to(device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight.to(x.dtype))


class Adapted(torch.autograd.Function):
    """x W^T + bias + scale (x A^T) B^T, in the dtype of x; W and bias are frozen, A and B float32 masters, as are their gradients.

    The low-rank part is added within its product, in either pass, where PEFT's layer takes a product, a scaling and a sum.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        """x [..., i], weight [o, i], bias [o], a [r, i], b [o, r] -> [..., o]."""
        rows, a, b = x.reshape(-1, x.shape[-1]), a.to(x.dtype), b.to(x.dtype)
        down = linear(rows, a)
        ctx.save_for_backward(rows, down, weight, a, b)
        ctx.scale = scale
        return linear(rows, weight, bias).addmm_(down, b.t(), alpha=scale).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        rows, down, weight, a, b = ctx.saved_tensors
        up = grad.reshape(-1, len(weight)).contiguous()  # a product of strided bfloat16 inputs takes hundreds of times as long on a CPU
        inner = (up @ b).mul_(ctx.scale)
        da = (inner.t() @ rows).float() if ctx.needs_input_grad[3] else None
        db = (up.t() @ down).float().mul_(ctx.scale) if ctx.needs_input_grad[4] else None
        dx = (up @ weight).addmm_(inner, a).view(*grad.shape[:-1], weight.shape[1]) if ctx.needs_input_grad[0] else None
        return dx, None, None, da, db, None


def forward_of(layer: Any) -> Callable[..., torch.Tensor]:
    """A forward pass for PEFT's layer on an `nn.Linear` that obeys its switches (adapters off, which one is active)."""
    base = layer.base_layer

    def forward(x: torch.Tensor) -> torch.Tensor:
        (name,) = layer.active_adapters
        if layer.disable_adapters or name not in layer.lora_A:  # a reference's adapter may lie on fewer layers
            result: torch.Tensor = base(x)
            return result
        return Adapted.apply(x, base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])

    return forward
