"""The MLX implementation of `upo.backend`: Metal, CUDA and CPU. Importing it does not import MLX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from upo.backend import Learner
    from upo.config import RunConfig

name = "mlx"


def load(config: RunConfig) -> Learner:
    """Model, adapter, reference and optimizer as configured; initialises the ranks."""
    _need("mlx.core", "mlx_lm")
    from upo_mlx.loading import load_learner

    return load_learner(config)


def write_model(source: Path, folder: Path, bits: int | None, group: int) -> list[str]:
    """A model folder in mlx-lm's layout from one in HF layout, quantised to `bits` if given; see `upo_mlx.quantize`."""
    _need("mlx.core", "mlx_lm")
    from upo_mlx import quantize

    return quantize.write_model(source, folder, bits, group)


def check(config: RunConfig) -> None:
    """Raises the BackendError that `load` would, for a device, a memory limit or a quantisation that cannot be had here; loads no model."""
    _need("mlx.core")
    from upo_mlx import device

    device.check_quantize(config.quantize)
    device.limit_memory(config.train, device.choose_device(config.device))


def fast_dtype() -> str:
    """The dtype that the default device multiplies fastest."""
    from upo_mlx import device

    return device.fast_dtype()


def free_memory(name: str) -> tuple[str, int]:
    """The device of this name and the bytes free on it. Raises BackendError for one that is not there."""
    _need("mlx.core")
    from upo_mlx import device

    where = device.choose_device(name)
    return where, device.free_memory(where)


def device_report() -> dict[str, Any]:
    """What `upo doctor` shows: version, devices, memory, BLAS, what is missing and the command that mends it."""
    _need("mlx.core")
    from upo_mlx import device

    return device.device_report()


def _need(*modules: str) -> None:
    from importlib.util import find_spec

    from upo.errors import BackendError

    try:
        missing = [module for module in modules if find_spec(module) is None]
    except ModuleNotFoundError:  # a package that holds one of them
        missing = list(modules)
    if missing:
        raise BackendError(f'backend: {", ".join(missing)} not installed. Install the MLX backend with: pip install "upo[mlx]"')
