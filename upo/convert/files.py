"""An adapter folder in memory: its configuration and its tensors, checked as far as that goes without knowing the format."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from upo import tensors
from upo.convert.adapter import FLOATS, Tensor
from upo.errors import ModelError
from upo.models import read_json

CONFIG = "adapter_config.json"
_NAME = re.compile(r"[A-Za-z0-9_]+([.\-][A-Za-z0-9_]+)*")


@dataclass(frozen=True)
class Files:
    """What a format reads and writes."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    where: str = "result"  # the folder, for messages


def read_files(folder: Path, weights: str) -> Files:
    """Configuration and tensors of a folder. Raises ModelError for damage, odd names, numbers that are no floats or not finite."""
    config, path = read_json(folder / CONFIG), folder / weights
    if not path.is_file():
        pickles = [name for name in ("adapter_model.bin", "adapters.npz") if (folder / name).exists()]
        if pickles:
            raise ModelError(
                f"{folder / pickles[0]}: a pickle or an archive, which upo does not open. Save the adapter again with a current version of its tool, "
                f"which writes {weights}."
            )
        raise ModelError(f"{path}: missing. Such an adapter is {CONFIG} and {weights}.")
    entries = tensors.read_header(path).entries
    for name, entry in entries.items():
        if len(name) > 500 or not _NAME.fullmatch(name):
            raise ModelError(f"{path}: {name[:100]!a} is no name of a weight. Refused.")
        if entry.dtype not in FLOATS:
            raise ModelError(f"{path}: {name} is {entry.dtype!a}; adapters are {', '.join(FLOATS)}. Refused.")
        if not 1 <= len(entry.shape) <= 3 or not all(0 < n < 2**31 for n in entry.shape):
            raise ModelError(f"{path}: {name}: shape {list(entry.shape)[:8]} is none of an adapter. Refused.")
    if not entries:
        raise ModelError(f"{path}: holds no weights.")
    found = {name: Tensor(entries[name].dtype, raw) for name, raw in tensors.read(path, upcast=False).items()}
    for name, tensor in found.items():
        if not np.isfinite(tensors.float32_from_bf16(tensor.raw) if tensor.dtype == "BF16" else tensor.raw).all():
            raise ModelError(f"{path}: {name}: holds NaN or infinity.")
    return Files(config, found, str(folder))


def write_files(files: Files, folder: Path, weights: str, metadata: Mapping[str, str]) -> None:
    """Write both files into an existing folder, synced."""
    arrays = {name: tensor.raw for name, tensor in files.tensors.items()}
    tensors.write(folder / weights, arrays, metadata, {name: tensor.dtype for name, tensor in files.tensors.items()})
    with (folder / CONFIG).open("w", encoding="utf-8") as file:
        file.write(json.dumps(files.config, indent=2, sort_keys=True, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def number(where: str, key: str, value: Any) -> float:
    """A finite number from JSON, or ModelError naming the key."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            found = float(value)
        except OverflowError:
            found = math.inf
        if math.isfinite(found) and abs(found) < 1e30:
            return found
    raise ModelError(f"{where}: {key} must be a number (got {_shown(value)}).")


def whole(where: str, key: str, value: Any) -> int:
    """A whole number above 0 from JSON, or ModelError naming the key."""
    if type(value) is int and 0 < value < 2**31:
        return value
    raise ModelError(f"{where}: {key} must be a whole number above 0 (got {_shown(value)}).")


def text(where: str, key: str, value: Any) -> str | None:
    """A line of text or None from JSON, or ModelError naming the key."""
    if value is None or (isinstance(value, str) and len(value) < 4096 and value.isprintable()):
        return value
    raise ModelError(f"{where}: {key} must be a line of text (got {_shown(value)}).")


def words(where: str, key: str, value: Any) -> list[str]:
    """A list of texts from JSON (None: empty), or ModelError naming the key."""
    if value is None:
        return []
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise ModelError(f"{where}: {key} must be a list of names (got {_shown(value)}).")


def _shown(value: Any) -> str:
    shown = ascii(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
    return shown if len(shown) <= 60 else shown[:60] + "..."
