"""A run on disk: configuration, manifest, metrics, checkpoints, the resulting adapter. Data only; nothing in it is ever executed."""

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
from upo.train.metrics import plain
from upo.train.reporter import Reporter

State = dict[str, dict[str, np.ndarray]]
CONTENTS = ("config.yaml", "manifest.json", "metrics.jsonl", "summary.json", "checkpoints", "adapter")
FILES = {"adapter": "adapter_model.safetensors", "value_head": "value_head.safetensors", "optimizer": "optimizer.safetensors"}


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, its checksums verified."""

    folder: Path
    step: int  # optimizer steps done
    seconds: dict[str, float]  # spent so far: reference, train, total

    def state(self) -> State:
        """What `Learner.load_state` takes."""
        return {part: tensors.read(self.folder / name) if (self.folder / name).is_file() else {} for part, name in FILES.items()}


class Run:
    """The folder of one run. Only rank 0 writes."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.metrics = folder / "metrics.jsonl"

    def check_new(self) -> None:
        """Raise RunError if the folder holds a run, or is no folder."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"--out {self.path}: this is a file. Name a folder that does not exist yet.")
        found = [name for name in CONTENTS if (self.path / name).exists()]
        if found:
            go_on = "" if "summary.json" in found else f", or go on with it: upo train --resume --out {self.path}"
            raise RunError(f"--out {self.path}: holds a run already ({', '.join(found)}). Name another folder{go_on}.")

    def check_resumable(self) -> None:
        """Raise RunError if there is no run to go on with, or it is finished."""
        missing = [name for name in ("config.yaml", "manifest.json") if not (self.path / name).is_file()]
        if missing:
            raise RunError(f"--resume: {self.path} holds no run ({' and '.join(missing)} missing). Start one: upo train CONFIG --out {self.path}")
        if (self.path / "summary.json").is_file():
            raise RunError(
                f"--resume: the run in {self.path} is finished; its result is {self.path / 'adapter'}. To train on, start a new run with adapter.start set to it."
            )

    def create(self, config: str, manifest: Mapping[str, Any]) -> None:
        """Write configuration (YAML text) and manifest into a folder that holds no run."""
        self.check_new()
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "checkpoints").mkdir()
        write_text(self.path / "config.yaml", config)
        self.write_json("manifest.json", manifest)
        self.metrics.touch()

    def manifest(self) -> dict[str, Any]:
        """The manifest. Raises RunError if it cannot be read."""
        try:
            manifest = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / 'manifest.json'}: cannot be read ({error}). The run cannot be resumed.") from None
        if not isinstance(manifest, dict):
            raise RunError(f"{self.path / 'manifest.json'}: not a manifest. The run cannot be resumed.")
        return manifest

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace a JSON file at once."""
        write_text(self.path / name, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain(record), allow_nan=False) + "\n")

    def records(self, step: int | None = None) -> list[dict[str, Any]]:
        """The complete lines of metrics.jsonl, or those of the first `step` steps."""
        if not self.metrics.is_file():
            return []
        records = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:  # the process ended while it wrote this line
                break
        return [record for record in records if step is None or record["step"] <= step]

    def truncate(self, step: int) -> list[dict[str, Any]]:
        """Forget metrics after `step` steps; returns those that stay."""
        kept = self.records(step)
        write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))
        return kept

    def checkpoint_folder(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:06d}"

    def save(self, step: int, state: State, adapter_config: dict[str, Any], seconds: Mapping[str, float], keep: int | None) -> Path:
        """Write a checkpoint at once (temporary folder, fsync, rename) and remove all but the `keep` newest (None: keep all).

        A complete checkpoint of this step stays as it is: the state after a number of steps is one thing. A damaged one is replaced.
        """
        final = self.checkpoint_folder(step)
        if not self._complete(final):
            self.sweep()
            sync(self.metrics)
            temporary = final.with_name(f".tmp-{final.name}")
            adapters.write_adapter(temporary, state["adapter"], adapter_config)
            for part, name in FILES.items():
                if part != "adapter" and state.get(part):
                    tensors.write(temporary / name, state[part])
            files = {path.name: file_hash(path) for path in sorted(temporary.iterdir())}
            content = {"step": step, "seconds": dict(seconds), "files": files}
            (temporary / "state.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            for path in (*temporary.iterdir(), temporary):
                sync(path)
            if final.is_dir():
                shutil.rmtree(final)
            os.replace(temporary, final)
            sync(final.parent)
        for old in self._folders()[:-keep] if keep else []:
            shutil.rmtree(old)
        return final

    def newest(self, reporter: Reporter) -> Checkpoint | None:
        """The newest complete checkpoint, or None; a damaged one is named and passed over."""
        for folder in reversed(self._folders()):
            try:
                return read_checkpoint(folder)
            except RunError as error:
                reporter.warn(f"{error} Passed over.")
        return None

    def last_step(self) -> int | None:
        """Steps done in the newest checkpoint, complete or not; None without one."""
        folders = self._folders()
        return int(folders[-1].name.removeprefix("step-")) if folders else None

    def sweep(self) -> None:
        """Remove what an interrupted write left behind."""
        for folder in (self.path / "checkpoints").glob(".*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _complete(self, folder: Path) -> bool:
        try:
            read_checkpoint(folder)
        except RunError:
            return False
        return True

    def _folders(self) -> list[Path]:
        """Checkpoints from oldest to newest."""
        found = (f for f in (self.path / "checkpoints").glob("step-*") if f.is_dir() and f.name.removeprefix("step-").isdigit())
        return sorted(found, key=lambda f: int(f.name.removeprefix("step-")))


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises RunError if a file is missing or its SHA-256 differs."""
    try:
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files, step, seconds = dict(content["files"]), int(content["step"]), dict(content["seconds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder}: no readable state.json ({error}).") from None
    if FILES["adapter"] not in files:
        raise RunError(f"{folder}: state.json lists no {FILES['adapter']}.")
    for name, expected in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise RunError(f"{folder}: {name} is missing.")
        if file_hash(path) != expected:
            raise RunError(f"{folder}: {name} is damaged (its SHA-256 is not the one in state.json).")
    return Checkpoint(folder, step, seconds)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace a text file at once."""
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
