"""The MLX implementation of `upo.backend`: Metal, CUDA and CPU. Importing it does not import MLX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upo.backend import Learner
    from upo.config import RunConfig

name = "mlx"


def load(config: RunConfig) -> Learner:
    """Model, adapter, reference and optimizer as configured; initialises the ranks."""
    from upo_mlx.step import load_learner

    return load_learner(config)


def device_report() -> dict[str, Any]:
    """What `upo doctor` shows: version, devices, memory, BLAS, what is missing and the command that mends it."""
    from upo_mlx import device

    return device.device_report()
