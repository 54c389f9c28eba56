"""One way to run a function of `Ops` on NumPy, torch and MLX, with gradients where there are any. For tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import pytest

from upo.backend import installed

NAMES = ("numpy", "torch", "mlx")
TOLERANCE = {  # (relative, absolute)
    "numpy": {"value": (1e-12, 1e-14)},  # float64
    "torch": {"value": (1e-5, 1e-6), "gradient": (1e-4, 1e-6)},  # float32
    "torch64": {"value": (1e-12, 1e-14), "gradient": (1e-10, 1e-15)},  # float64; sums of 1e3 lose some digits of a gradient of 1e-9
    "mlx": {"value": (1e-5, 1e-6), "gradient": (1e-4, 1e-6)},  # float32; its exp is off by up to 3.5e-6 on a CPU
}


class Interpreter:
    """NumPy in float64: values only."""

    name = "numpy"
    differentiates = False

    def __init__(self) -> None:
        from upo.numpy_ops import ops

        self.ops = ops

    def floats(self, x: Any) -> Any:
        return np.asarray(x, np.float64)

    def indices(self, x: Any) -> Any:
        return np.asarray(x, np.int64)

    def numpy(self, x: Any) -> np.ndarray:
        return np.asarray(x)

    def gradient(self, function: Callable[..., Any], inputs: Sequence[Any]) -> list[np.ndarray]:
        """Gradient of a scalar function of arrays with respect to each of them; zeros where it does not depend on one."""
        raise NotImplementedError


class Torch(Interpreter):
    """float32 on the CPU."""

    name = "torch"
    differentiates = True

    def __init__(self) -> None:
        import torch

        from upo_torch.ops import ops

        self.torch, self.ops = torch, ops

    def floats(self, x: Any) -> Any:
        return self.torch.tensor(np.asarray(x, np.float32))

    def indices(self, x: Any) -> Any:
        return self.torch.tensor(np.asarray(x, np.int64))

    def numpy(self, x: Any) -> np.ndarray:
        return x.detach().numpy()

    def gradient(self, function: Callable[..., Any], inputs: Sequence[Any]) -> list[np.ndarray]:
        leaves = [self.floats(x).requires_grad_() for x in inputs]
        out = function(*leaves)
        if not out.requires_grad:
            return [np.zeros_like(self.numpy(leaf)) for leaf in leaves]
        grads = self.torch.autograd.grad(out, leaves, allow_unused=True, materialize_grads=True)
        return [self.numpy(g) for g in grads]


class Torch64(Torch):
    """float64 on the CPU: what float32 leaves undecided, e.g. gradients of 1e-9."""

    name = "torch64"

    def floats(self, x: Any) -> Any:
        return self.torch.tensor(np.asarray(x, np.float64))


class Mlx(Interpreter):
    """float32 on the default device."""

    name = "mlx"
    differentiates = True

    def __init__(self) -> None:
        import mlx.core as mx

        from upo_mlx.ops import ops

        self.mx, self.ops = mx, ops

    def floats(self, x: Any) -> Any:
        return self.mx.array(np.asarray(x, np.float32))

    def indices(self, x: Any) -> Any:
        return self.mx.array(np.asarray(x, np.int32))

    def numpy(self, x: Any) -> np.ndarray:
        return np.array(x)

    def gradient(self, function: Callable[..., Any], inputs: Sequence[Any]) -> list[np.ndarray]:
        leaves = [self.floats(x) for x in inputs]
        grads = self.mx.grad(lambda xs: function(*xs))(leaves)
        return [self.numpy(g) for g in grads]


def need_backend(name: str) -> None:
    """Skip the test where this framework is not installed (see --require in conftest.py)."""
    if not installed(name):
        pytest.skip(f'{name} is not installed: pip install "upo[{name}]"')
    if name == "torch":
        import torch

        torch.set_num_threads(1)


def mlx_lm_is_old() -> bool:
    """Whether mlx-lm is the one of Python 3.10, the last that runs there: some families are other ones in it (docs/models.md)."""
    return installed("mlx") and tuple(map(int, metadata.version("mlx-lm").split(".")[:2])) < (0, 32)


def interpreter(name: str) -> Interpreter:
    """The interpreter, or a skip where its framework is not installed."""
    if name != "numpy":
        need_backend(name.removesuffix("64"))
    return {"numpy": Interpreter, "torch": Torch, "torch64": Torch64, "mlx": Mlx}[name]()


def close(interpreter: Interpreter, what: str, found: Any, expected: Any, tails: bool = False, size: float = 0.0) -> None:
    """Assert equal shapes, and numbers within the interpreter's tolerance; inf and nan must be equal.

    With `tails` the tolerance is relative only: 2e-9 instead of 0 matters to a gradient. `size` is that of the numbers a value is the
    mean of: where they cancel, their rounding remains.
    """
    assert np.shape(found) == np.shape(expected), (what, np.shape(found), np.shape(expected))
    relative, absolute = TOLERANCE[interpreter.name][what]
    absolute = max(absolute, size * (2.0**-52 if interpreter.name in ("numpy", "torch64") else 2.0**-24))
    np.testing.assert_allclose(np.asarray(found, np.float64), np.asarray(expected, np.float64), rtol=relative, atol=1e-30 if tails else absolute, err_msg=what)
