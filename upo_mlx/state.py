"""Optimizers as torch defines them, and everything that training changes as NumPy arrays in PEFT's and torch's names and layouts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from upo.errors import RunError
from upo_mlx.device import mx, to_numpy

Array = mx.array
Arrays = dict[str, Array]

BETA1, BETA2, ALPHA = 0.9, 0.999, 0.99
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "rmsprop": ("square_avg",)}


class Optimizer:
    """AdamW with bias correction, or RMSprop with eps outside the root; weight decay is AdamW's (decoupled) in the first, added to the gradient in the second.

    `mlx.optimizers` has neither torch's default bias correction nor its state names, so the two updates are written out here.
    """

    def __init__(self, kind: str, params: Mapping[str, Array], eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        self.kind, self.eps, self.weight_decay = kind, eps, weight_decay
        self.steps = 0
        self.moments: dict[str, Arrays] = {m: {name: mx.zeros_like(p) for name, p in params.items()} for m in MOMENTS[kind]}

    def update(self, params: Mapping[str, Array], grads: Mapping[str, Array], lr: float) -> Arrays:
        """New parameters; the moments and the step count advance."""
        self.steps += 1
        return {name: getattr(self, f"_{self.kind}")(name, param, grads[name], lr) for name, param in params.items()}

    def _adamw(self, name: str, param: Array, grad: Array, lr: float) -> Array:
        mean, square = self.moments["exp_avg"], self.moments["exp_avg_sq"]
        mean[name] = BETA1 * mean[name] + (1 - BETA1) * grad
        square[name] = BETA2 * square[name] + (1 - BETA2) * grad * grad
        root = mx.sqrt(square[name]) / (1 - BETA2**self.steps) ** 0.5
        return param * (1 - lr * self.weight_decay) - lr / (1 - BETA1**self.steps) * (mean[name] / (root + self.eps))

    def _rmsprop(self, name: str, param: Array, grad: Array, lr: float) -> Array:
        grad = grad + self.weight_decay * param if self.weight_decay else grad
        square = self.moments["square_avg"]
        square[name] = ALPHA * square[name] + (1 - ALPHA) * grad * grad
        return param - lr * (grad / (mx.sqrt(square[name]) + self.eps))

    def state(self, prefix: str = "") -> dict[str, np.ndarray]:
        """`<prefix><name>.exp_avg`, ..., `.step`."""
        names = next(iter(self.moments.values()))
        steps = {f"{prefix}{name}.step": np.array(self.steps, np.float32) for name in names}
        return {f"{prefix}{name}.{m}": a for m, arrays in self.moments.items() for name, a in export_arrays(arrays).items()} | steps

    def load_state(self, state: Mapping[str, np.ndarray], prefix: str = "") -> None:
        """Inverse of `state`; the caller has checked names and shapes (`check_like`). Raises RunError if parameters are at different steps."""
        moments = {m: import_arrays({name: state[f"{prefix}{name}.{m}"] for name in arrays}) for m, arrays in self.moments.items()}
        steps = {int(array) for name, array in state.items() if name.startswith(prefix) and name.endswith(".step")}
        if len(steps) > 1:
            raise RunError(f"checkpoint: optimizer: parameters at different steps ({', '.join(map(str, sorted(steps)))}); all advance together here.")
        self.moments, self.steps = moments, max(steps, default=0)


def clip(grads: Mapping[str, Array], largest: float) -> tuple[Arrays, Array]:
    """Gradients scaled to a global norm of at most `largest`, by torch's min(1, largest / (norm + 1e-6)), and the norm before."""
    total = norm(grads)
    scale = mx.minimum(1.0, largest / (total + 1e-6))
    return {name: grad * scale for name, grad in grads.items()}, total


def norm(grads: Mapping[str, Array]) -> Array:
    """Global L2 norm. Summed by rows first: flat float32 sums over long arrays are biased on CPUs.

    In the order of the names: a checkpoint does not keep that of the dictionary, and a resumed run must round as the whole one.
    """
    squares = [mx.sum(mx.sum(grads[name] * grads[name], axis=-1)) for name in sorted(grads)]
    return mx.sqrt(mx.sum(mx.stack(squares)))


def export_arrays(arrays: Mapping[str, Array]) -> dict[str, np.ndarray]:
    """float32 NumPy copies; LoRA matrices, which MLX holds as [in, r] and [r, out], in PEFT's orientation."""
    return {name: np.ascontiguousarray(to_numpy(a).T if _is_lora(name) else to_numpy(a)) for name, a in arrays.items()}


def import_arrays(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Inverse of `export_arrays`."""
    return {name: mx.array(np.ascontiguousarray(a.T if _is_lora(name) else a, np.float32)) for name, a in arrays.items()}


def _is_lora(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_B.weight"))
