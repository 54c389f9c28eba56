"""The two optimizers, and everything that training changes as NumPy arrays in PEFT's and torch's names and layouts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

Arrays = dict[str, np.ndarray]
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "rmsprop": ("square_avg",)}


class Optimizer:
    """torch's AdamW (0.9, 0.999) or RMSprop (0.99) over named float32 parameters, with its state present from the start.

    Gradients are places of one vector, `grads`, which is set to zero, summed over ranks, measured and scaled at once.
    """

    def __init__(self, kind: str, params: Mapping[str, torch.Tensor], eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        self.params, self.moments = dict(params), MOMENTS[kind]
        values = list(self.params.values())
        place = values[0].device if values else torch.device("cpu")
        self.grads = torch.zeros(sum(p.numel() for p in values), device=place)
        fused = place.type in ("cpu", "cuda")  # one call for all parameters
        self._torch: torch.optim.Optimizer = (
            torch.optim.AdamW(values, betas=(0.9, 0.999), eps=eps, weight_decay=weight_decay, fused=fused)
            if kind == "adamw"
            else torch.optim.RMSprop(values, alpha=0.99, eps=eps, weight_decay=weight_decay)
        )
        for param in values:  # torch makes it in the first step; a checkpoint of step 0 needs it too
            step = torch.zeros((), device=place if fused and kind == "adamw" else "cpu")
            self._torch.state[param] = {"step": step, **{m: torch.zeros_like(param, requires_grad=False) for m in self.moments}}

    def zero_grad(self) -> None:
        """A zero gradient for each parameter, so that one the loss does not reach is updated as any other."""
        self.grads.zero_()
        for param, grad in zip(self.params.values(), self.grads.split([p.numel() for p in self.params.values()]), strict=True):
            param.grad = grad.view_as(param)

    def clip(self, largest: float) -> float:
        """Scale the gradients to a global norm of at most `largest`, by min(1, largest / (norm + 1e-6)); returns the norm before."""
        norm = torch.linalg.vector_norm(self.grads)
        self.grads.mul_((largest / (norm + 1e-6)).clamp(max=1.0))
        return float(norm)

    def step(self, lr: float) -> None:
        """Update the parameters in place by their gradients."""
        for group in self._torch.param_groups:
            group["lr"] = lr
        self._torch.step()

    def state(self, prefix: str = "") -> Arrays:
        """`<prefix><name>.exp_avg`, ..., `.step`."""
        kinds = (*self.moments, "step")
        return {f"{prefix}{name}.{kind}": to_numpy(self._torch.state[param][kind]) for name, param in self.params.items() for kind in kinds}

    def load_state(self, state: Mapping[str, np.ndarray], prefix: str = "") -> None:
        """Inverse of `state`; the caller has checked names and shapes (`check_like`)."""
        for name, param in self.params.items():
            for kind, tensor in self._torch.state[param].items():
                tensor.copy_(torch.from_numpy(np.array(state[f"{prefix}{name}.{kind}"], np.float32)))


def export_arrays(params: Mapping[str, torch.Tensor]) -> Arrays:
    """float32 NumPy copies."""
    return {name: to_numpy(param) for name, param in params.items()}


@torch.no_grad()
def import_arrays(params: Mapping[str, torch.Tensor], arrays: Mapping[str, np.ndarray]) -> None:
    """Overwrite parameters in place."""
    for name, param in params.items():
        param.copy_(torch.from_numpy(np.array(arrays[name], np.float32)))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A float32 NumPy copy of a tensor on any device."""
    return tensor.detach().to("cpu", torch.float32, copy=True).numpy()
