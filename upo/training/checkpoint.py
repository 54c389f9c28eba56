"""One checkpoint on disk: the folder of an adapter with optimizer and state beside it, every file under its SHA-256.

Safetensors and JSON only. Names and layouts are PEFT's and torch's whichever backend wrote it, so either one goes on from it. No state
of a random generator is among it: every draw is a function of the seed, a purpose and a name (`upo.random`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from upo import adapters, tensors
from upo.errors import RunError
from upo.training.files import file_hash, sync, write_text

State = dict[str, dict[str, np.ndarray]]
FORMAT = 1
STATE = "state.json"
FILES = {  # part of a learner's state -> its file; a part without arrays has none
    "adapter": adapters.WEIGHTS,
    "value_head": "value_head.safetensors",
    "optimizer": "optimizer.safetensors",
    "losses": "losses.safetensors",  # running states of losses
}
REQUIRED = (adapters.WEIGHTS, adapters.CONFIG, FILES["optimizer"])
SECONDS = ("reference", "train", "total")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, its checksums verified."""

    folder: Path
    step: int  # optimizer steps done
    seconds: dict[str, float]  # spent so far: reference, train, total
    origin: dict[str, Any]  # the rest of state.json: identity, order, schedule, ... as the run noted them
    files: tuple[str, ...]  # verified

    def state(self) -> State:
        """What `Learner.load_state` takes. Only `losses` is left out where there are none."""
        found = {part: tensors.read(self.folder / name) if name in self.files else {} for part, name in FILES.items()}
        return {part: arrays for part, arrays in found.items() if arrays or part != "losses"}


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def write_checkpoint(
    final: Path, step: int, state: State, adapter_config: dict[str, Any], seconds: Mapping[str, float], origin: Mapping[str, Any]
) -> None:
    """Write a checkpoint at once: into a temporary folder beside it, every file synced, then renamed; a damaged one there is replaced.

    Raises OSError with nothing left of it.
    """
    temporary = final.with_name(f".tmp-{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        adapters.write_adapter(temporary, state["adapter"], adapter_config)
        for part, name in FILES.items():
            if part != "adapter" and state.get(part):
                tensors.write(temporary / name, state[part])
        files = {path.name: file_hash(path) for path in sorted(temporary.iterdir())}
        content = {"format": FORMAT, "step": step, "seconds": dict(seconds), **origin, "files": files}
        write_text(temporary / STATE, json.dumps(seal(content), indent=2, allow_nan=False) + "\n")
        sync(temporary)
        if final.is_dir():
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync(final.parent)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises RunError if a file is missing or its SHA-256 differs; names in it cannot leave the folder."""
    content = _content(folder)
    step, seconds, files = content.pop("step", None), content.pop("seconds", None), content.pop("files", None)
    if type(step) is not int or folder.name != checkpoint_name(step):
        raise RunError(f"{folder}: {STATE} is that of step {step}, not of this folder.")
    if not isinstance(seconds, dict) or not all(_is_time(seconds.get(name)) for name in SECONDS):
        raise RunError(f"{folder}: {STATE} does not say how many seconds went by.")
    if not isinstance(files, dict) or not all(isinstance(expected, str) for expected in files.values()):
        raise RunError(f"{folder}: {STATE} does not list its files.")
    for name in REQUIRED:
        if name not in files:
            raise RunError(f"{folder}: {STATE} lists no {name}.")
    for name, expected in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise RunError(f"{folder}: {name} is missing.")
        if _hash(path) != expected:
            raise RunError(f"{folder}: {name} is damaged (its SHA-256 is not the one in {STATE}).")
    for name, part in content.items():
        if not isinstance(part, dict):
            raise RunError(f"{folder}: {STATE}: {name} is not a mapping.")
    return Checkpoint(folder, step, {name: float(seconds[name]) for name in SECONDS}, content, tuple(files))


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with the SHA-256 of all the rest of it under `sha256`."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return {**rest, "sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def _content(folder: Path) -> dict[str, Any]:
    """state.json without its seal."""
    try:
        content = json.loads((folder / STATE).read_text(encoding="utf-8"))
        intact = isinstance(content, dict) and content.pop("sha256", None) == seal(content)["sha256"]
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{folder}: no readable {STATE} ({_reason(error)}).") from None
    if not intact:
        raise RunError(f"{folder}: {STATE} is damaged (its SHA-256 is not the one it carries).")
    if content.pop("format", None) != FORMAT:
        raise RunError(f"{folder}: {STATE} was written by another version of upo.")
    return dict(content)


def _hash(path: Path) -> str:
    try:
        return file_hash(path)
    except OSError as error:
        raise RunError(f"{path.parent}: {path.name} cannot be read ({_reason(error)}).") from None


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e12
