"""What a run was made of and by whom it was computed."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

import numpy as np

import upo
from upo.backend import Learner
from upo.train.prepare import Prepared

PACKAGES = {"torch": ("torch", "transformers", "peft"), "mlx": ("mlx", "mlx-lm", "transformers")}


def first_manifest(
    prepared: Prepared, learner: Learner, identity: Mapping[str, str], references: Mapping[str, str], value_fit: Mapping[str, float]
) -> dict[str, Any]:
    """The manifest of a new run, no session yet: versions, hashes, sizes."""
    info, config = learner.info, prepared.config
    return {
        "upo": upo.__version__,
        "created": _now(),
        "identity": dict(identity),
        "data": {
            "train": {"source": config.data.train, "rows": len(prepared.train), "completions": sum(len(e.completions) for e in prepared.train)},
            "eval": {"source": config.data.eval, "rows": len(prepared.eval), "completions": sum(len(e.completions) for e in prepared.eval)},
        },
        "model": {"name": info.name, "parameters": info.parameters, "trainable": info.trainable, "targets": list(info.targets)},
        "reference": {"spec": config.reference, "keys": dict(references)},
        "value_fit": dict(value_fit),
        "steps": prepared.total,
        "sessions": [],
    }


def session_entry(backend: str, learner: Learner, step: int) -> dict[str, Any]:
    """One stretch of a run on one backend: steps from_step + 1 to to_step, the latter filled in when it ends."""
    return {
        "backend": backend,
        "device": learner.info.device,
        "dtype": learner.info.dtype,
        "ranks": learner.comm.size,
        "from_step": step,
        "to_step": None,
        "started": _now(),
        "versions": {"upo": upo.__version__, "python": platform.python_version(), "numpy": np.__version__, **_versions(backend)},
    }


def _versions(backend: str) -> dict[str, str]:
    found = {}
    for name in PACKAGES.get(backend, ()):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
