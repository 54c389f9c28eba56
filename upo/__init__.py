"""upo: preference optimisation of language models with goals of your own, on MLX and on PyTorch.

    from upo import load_config, train
    train(load_config("run.yaml"), "runs/one")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from upo.config import RunConfig as RunConfig
    from upo.config import load_config as load_config
    from upo.errors import UpoError as UpoError
    from upo.training.loop import train as train

# Loaded at first use, so that `upo --help` stays instant and the core imports without a framework.
_PUBLIC = {
    "RunConfig": "upo.config",
    "UpoError": "upo.errors",
    "load_config": "upo.config",
    "train": "upo.training.loop",
}

__all__ = ["RunConfig", "UpoError", "__version__", "load_config", "train"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'upo' has no attribute '{name}'")
