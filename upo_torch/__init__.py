"""The PyTorch implementation of `upo.backend`: CUDA, MPS and CPU. Importing it does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from upo.backend import Learner
    from upo.config import RunConfig
    from upo_torch.classify import Classifier

name = "torch"


def load(config: RunConfig) -> Learner:
    """Model, adapter, reference and optimizer as configured; initialises the ranks."""
    _need("torch", "transformers", "peft")
    from upo_torch.loading import load_learner

    return load_learner(config)


def classifier(folder: Path, dtype: str) -> Classifier:
    """A sequence classifier or reward model from a folder that `upo.models.resolve` has checked."""
    _need("torch", "transformers")
    from upo_torch.classify import Classifier

    return Classifier(folder, dtype)


def check(config: RunConfig) -> None:
    """Raises the BackendError that `load` would, for a device, a memory limit or a quantisation that cannot be had here; loads no model."""
    _need("torch")
    from upo_torch import device

    where = device.choose_device(config.device)
    device.limit_memory(config.train, where)
    device.check_quantize(config.quantize, where)


def fast_dtype() -> str:
    """The dtype that the default device multiplies fastest."""
    from upo_torch import device

    return device.fast_dtype()


def free_memory(name: str) -> tuple[str, int]:
    """The device of this name and the bytes free on it. Raises BackendError for one that is not there."""
    _need("torch")
    from upo_torch import device

    where = device.choose_device(name)
    return where.type, device.free_memory(where)


def device_report() -> dict[str, Any]:
    """What `upo doctor` shows: version, devices, memory, BLAS, what is missing and the command that mends it."""
    _need("torch")
    from upo_torch import device

    return device.device_report()


def _need(*modules: str) -> None:
    from importlib.util import find_spec

    from upo.errors import BackendError

    if missing := [module for module in modules if find_spec(module) is None]:
        raise BackendError(f'backend: {", ".join(missing)} not installed. Install the PyTorch backend with: pip install "upo[torch]"')
