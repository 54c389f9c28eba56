"""What is evaluated: the result or a checkpoint of a run, an adapter on its model, or a model alone, and what it is compared with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from upo.adapters import read_adapter
from upo.backend import Learner
from upo.config import RunConfig, load_config
from upo.errors import ModelError, RunError
from upo.training.checkpoint import read_checkpoint
from upo.training.reporter import Reporter
from upo.training.run import Run


@dataclass(frozen=True)
class Target:
    """A configuration that loads what is evaluated, and where it came from."""

    config: RunConfig  # adapter.start is the trained adapter
    run: Path | None = None
    checkpoint: str | None = None  # latest, best or step-000100, of a run
    step: int | None = None
    adapter: Path | None = None  # the trained one
    started: Path | None = None  # the adapter that training began with; None: the base model

    def before(self, learner: Learner) -> Mapping[str, np.ndarray]:
        """The adapter as it was before training: another one, or one that changes nothing."""
        trained = learner.state()["adapter"]
        if self.started is None:
            return {name: np.zeros_like(array) if ".lora_B." in name else array for name, array in trained.items()}
        start = read_adapter(self.started).arrays
        if {name: array.shape for name, array in start.items()} != {name: array.shape for name, array in trained.items()}:
            raise ModelError(f"{self.started}: not the adapter that this run started from (its modules or ranks differ).")
        return start


def target_of_run(folder: Path, checkpoint: str, overrides: Mapping[str, Any], reporter: Reporter) -> Target:
    """A run's result (`latest`), the checkpoint kept by train.keep_best (`best`), or that of a step (`step-40`, `40`).

    `overrides` replaces keys of its configuration. Raises RunError, ModelError, ConfigError.
    """
    trained, (name, step, adapter) = load_config(folder / "config.yaml"), _find(folder, checkpoint, reporter)
    data = trained.model_dump(mode="json")
    started = trained.adapter.start
    data["adapter"] = {"start": str(adapter)}
    data["reference"] = [started if reference == "start" else reference for reference in trained.references]
    if len(data["reference"]) == 1:
        (data["reference"],) = data["reference"]
    return Target(load_config({**data, **overrides}), folder, name, step, adapter, None if started is None else Path(started))


def target_of_model(model: str | None, adapter: Path | None, overrides: Mapping[str, Any]) -> Target:
    """A model with an adapter, or an adapter on the model it names, or a model alone, compared with the bare model."""
    found = None if adapter is None else read_adapter(adapter)
    if model is None:
        model = found.base_model if found is not None else None
    if model is None:
        raise ModelError(f"{adapter}: does not name its base model. Add --model M.")
    start = {} if adapter is None else {"adapter": {"start": str(adapter)}}
    return Target(load_config({"model": model, "data": {"train": "-"}, **start, **overrides}), adapter=adapter)


def _find(folder: Path, checkpoint: str, reporter: Reporter) -> tuple[str, int | None, Path]:
    """(name, steps done, folder of the adapter) of a run's checkpoint."""
    run = Run(folder)
    summary: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    if checkpoint == "latest":
        if (folder / "adapter").is_dir():
            return "latest", summary.get("steps"), folder / "adapter"
        newest = run.newest(reporter)
        if newest is None:
            raise RunError(f"{folder}: this run has neither a result nor a checkpoint yet. Go on with it: {run.command}")
        reporter.info(f"The run is not finished; its newest checkpoint is that of step {newest.step}.")
        return "latest", newest.step, newest.folder
    if checkpoint == "best":
        step = (summary.get("best") or {}).get("step")
        if not isinstance(step, int):
            raise RunError(f"--checkpoint best: {folder} has none. It is kept where train.keep_best names a metric, and known when the run has ended.")
    else:
        number = checkpoint.removeprefix("step-")
        if not number.isdecimal():
            raise RunError(f"--checkpoint {checkpoint}: write latest, best or step-N.")
        step = int(number)
    path = run.checkpoint_folder(step)
    if not path.is_dir():
        there = ", ".join(sorted(p.name for p in path.parent.glob("step-*"))) or "none"
        raise RunError(f"--checkpoint {checkpoint}: {folder} has no {path.name}. There are: {there}.")
    return "best" if checkpoint == "best" else path.name, step, read_checkpoint(path).folder
