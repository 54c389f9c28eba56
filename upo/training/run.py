"""A run on disk: configuration, manifest, metrics, checkpoints, the resulting adapter. Data only; nothing in it is ever executed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from upo import adapters
from upo.errors import RunError
from upo.training import inputs as inputs_file
from upo.training.checkpoint import Checkpoint, State, checkpoint_name, read_checkpoint, write_checkpoint
from upo.training.files import check_writable, sync, write_text, writing
from upo.training.inputs import Inputs
from upo.training.manifest import is_manifest, strict_json
from upo.training.metrics import plain
from upo.training.reporter import Reporter

CONTENTS = ("config.yaml", "manifest.json", "inputs.safetensors", "metrics.jsonl", "summary.json", "checkpoints", "adapter")
LEFTOVERS = (".tmp-*", ".adapter.*", ".inputs.safetensors.*")  # of a write that was interrupted


class Run:
    """The folder of one run. Only rank 0 writes; what cannot be written is a RunError, and what was there before stays."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.metrics = folder / "metrics.jsonl"

    # --- May it be written to? ----------------------------------------------------------------------------------------------------

    def check_new(self) -> None:
        """Raise RunError if the folder holds a run, is no folder, or cannot be written to."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"--out {self.path}: this is a file. Name a folder that does not exist yet.")
        found = [name for name in CONTENTS if (self.path / name).exists()]
        if found and not self._never_began():
            go_on = "" if "summary.json" in found else f", or go on with it: {self.command}"
            raise RunError(f"--out {self.path}: holds a run already ({', '.join(found)}). Name another folder{go_on}.")
        check_writable(self.path, "--out")

    def check_resumable(self) -> None:
        """Raise RunError if there is no run to go on with, or it cannot be written to."""
        missing = [name for name in ("config.yaml", "manifest.json") if not (self.path / name).is_file()]
        if missing:
            raise RunError(f"--resume: {self.path} holds no run ({' and '.join(missing)} missing). Start one: upo train CONFIG --out {self.path}")
        check_writable(self.path, "--resume: --out")

    def check_unfinished(self, steps: int) -> None:
        """Raise RunError if a result of so many steps is there."""
        try:
            done = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))["steps"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return  # none, or not written to the end
        if done == steps:
            raise RunError(
                f"--resume: the run in {self.path} is finished; its result is {self.path / 'adapter'}. Give it more steps with "
                "--set train.epochs=... (or train.steps), or start a new run with adapter.start set to its adapter."
            )

    @property
    def has_summary(self) -> bool:
        """Whether a result was written."""
        return (self.path / "summary.json").is_file()

    @property
    def command(self) -> str:
        """What goes on with this run."""
        return f"upo train --resume --out {self.path}"

    def _never_began(self) -> bool:
        """Whether this is all that a process leaves which ended while it made the folder: its manifest comes first, its configuration last."""
        checkpoints = self.path / "checkpoints"
        if any((self.path / name).exists() for name in ("config.yaml", "summary.json", "adapter")):
            return False
        if (self.metrics.exists() and self.metrics.stat().st_size) or (checkpoints.exists() and any(checkpoints.iterdir())):
            return False
        if any((self.path / name).exists() for name in ("manifest.json", inputs_file.NAME)):
            try:
                self.manifest()
            except RunError:  # of something else
                return False
        return True

    # --- Configuration, manifest, result ------------------------------------------------------------------------------------------

    def create(self, config: str, manifest: Mapping[str, Any], inputs: Inputs) -> None:
        """Write manifest, inputs and, last, the configuration (YAML text) into a folder that holds no run."""
        self.check_new()
        with writing(self.path, "Nothing was trained yet."):
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            self.metrics.touch()
        self.write_json("manifest.json", manifest)
        self.write_inputs(inputs)
        self.write("config.yaml", config)

    def manifest(self) -> dict[str, Any]:
        """The manifest. Raises RunError if it cannot be read."""
        path = self.path / "manifest.json"
        try:
            manifest = strict_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"{path}: cannot be read ({error}). The run cannot be resumed.") from None
        if not is_manifest(manifest):
            raise RunError(f"{path}: not a manifest. The run cannot be resumed.")
        return manifest

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace a JSON file at once."""
        self.write(name, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def write(self, name: str, text: str) -> None:
        """Replace a text file at once."""
        with writing(self.path / name, f"Make room, then go on: {self.command}"):
            write_text(self.path / name, text)

    def write_inputs(self, inputs: Inputs) -> None:
        """Replace inputs.safetensors at once."""
        with writing(self.path / inputs_file.NAME, f"Make room, then go on: {self.command}"):
            inputs_file.write_inputs(self.path, inputs)

    def write_result(self, arrays: dict[str, np.ndarray], adapter_config: dict[str, Any]) -> None:
        """The trained adapter; an earlier result, of fewer steps, is replaced."""
        with writing(self.path / "adapter", f"Make room, then write it again: {self.command}"):
            adapters.write_adapter(self.path / "adapter", arrays, adapter_config, overwrite=True)

    # --- Metrics ------------------------------------------------------------------------------------------------------------------

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        with writing(self.metrics, f"Make room, then go on: {self.command}"), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain(record), allow_nan=False) + "\n")

    def records(self, step: int | None = None) -> list[dict[str, Any]]:
        """The complete lines of metrics.jsonl, or those of the first `step` steps."""
        return [record for record, _ in self._lines(step)]

    def truncate(self, step: int) -> list[dict[str, Any]]:
        """Forget metrics after `step` steps; returns those that stay, as they were."""
        kept = self._lines(step)
        self.write(self.metrics.name, "".join(f"{line}\n" for _, line in kept))
        return [record for record, _ in kept]

    def _lines(self, step: int | None) -> list[tuple[dict[str, Any], str]]:
        if not self.metrics.is_file():
            return []
        found = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                record = strict_json(line)
                wanted = step is None or record["step"] <= step
            except (ValueError, TypeError, KeyError, RecursionError):  # the process ended while it wrote this line
                continue
            if wanted:
                found.append((record, line))
        return found

    # --- Checkpoints --------------------------------------------------------------------------------------------------------------

    def checkpoint_folder(self, step: int) -> Path:
        return self.path / "checkpoints" / checkpoint_name(step)

    def save(
        self, step: int, state: State, adapter_config: dict[str, Any], seconds: Mapping[str, float], origin: Mapping[str, Any] | None = None
    ) -> Path:
        """Write a checkpoint at once. `origin` is what it notes besides about where it comes from.

        A complete checkpoint of this step stays as it is: the state after a number of steps is one thing. A damaged one is replaced.
        """
        final = self.checkpoint_folder(step)
        if not self._complete(final):
            last = self.last_step(step)
            before = f"The one of step {last} is untouched" if last is not None else "There is none before it"
            with writing(final, f"{before}. Make room, then go on: {self.command}"):
                self.sweep()
                sync(self.metrics)
                write_checkpoint(final, step, state, adapter_config, seconds, origin or {})
        return final

    def prune(self, step: int, newest: int, besides: Collection[int] = ()) -> None:
        """Remove all checkpoints up to `step` but the newest and those of the steps `besides`.

        One beyond `step` was passed over because it is damaged, and stays until the run comes by again.
        """
        for done in self._steps(step)[:-newest]:
            if done not in besides:
                folder = self.checkpoint_folder(done)
                with writing(folder, f"It was to be removed. Go on with: {self.command}"):
                    shutil.rmtree(folder)

    def newest(self, reporter: Reporter) -> Checkpoint | None:
        """The newest complete checkpoint, None if none was written yet. A damaged one is named and passed over.

        Raises RunError if there are checkpoints and none of them is complete.
        """
        faults = []
        for folder in map(self.checkpoint_folder, reversed(self._steps())):
            try:
                checkpoint = read_checkpoint(folder)
            except RunError as error:
                faults.append(str(error))
                continue
            for fault in faults:
                reporter.warn(f"{fault} Passed over.")
            return checkpoint
        if faults:
            raise RunError(f"--resume: no checkpoint is complete. {' '.join(faults)} Copy one again from where the run was made, or start a new run.")
        return None

    def last_step(self, step: int | None = None) -> int | None:
        """Steps done in the newest checkpoint (of the first `step` steps), complete or not; None without one."""
        return max(self._steps(step), default=None)

    def sweep(self) -> None:
        """Remove what an interrupted write left behind."""
        for path in (*(self.path / "checkpoints").glob(".*"), *(path for pattern in LEFTOVERS for path in self.path.glob(pattern))):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _complete(self, folder: Path) -> bool:
        try:
            read_checkpoint(folder)
        except RunError:
            return False
        return True

    def _steps(self, step: int | None = None) -> list[int]:
        """Steps of the checkpoints there are, complete or not, in order; of the first `step` steps only."""
        names = [folder.name.removeprefix("step-") for folder in (self.path / "checkpoints").glob("step-*") if folder.is_dir()]
        steps = sorted(int(name) for name in names if name.isdecimal() and checkpoint_name(int(name)) == f"step-{name}")
        return [s for s in steps if step is None or s <= step]
