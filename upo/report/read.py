"""What a run folder says of itself, whatever state it is in: files may be missing, cut short, or from anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upo.config import RunConfig, load_config
from upo.errors import ConfigError, RunError
from upo.report.evaluation import Evaluation, read_evaluation
from upo.report.plain import clean, mapping, number
from upo.rewards import make_scorer, unique_label
from upo.training.manifest import is_manifest
from upo.training.run import CONTENTS, Run


@dataclass(frozen=True)
class Told:
    """A run as its folder tells it."""

    path: Path
    name: str  # the folder's
    config: RunConfig | None  # None if it cannot be read
    config_text: str
    manifest: dict[str, Any]
    steps: list[dict[str, Any]]  # training lines of metrics.jsonl
    evals: list[dict[str, Any]]  # its evaluation lines
    summary: dict[str, Any]  # empty for a run that has not ended
    evaluation: Evaluation | None  # of sampled answers
    notes: list[str] = field(default_factory=list)  # what is missing or damaged, what was kept, how to go on

    @property
    def done(self) -> int:
        """Optimizer steps in the metrics."""
        return max((int(record["step"]) for record in (*self.steps, *self.evals)), default=0)

    @property
    def total(self) -> int | None:
        """Optimizer steps the run was to have."""
        steps = self.manifest.get("steps")
        return steps if type(steps) is int else None

    @property
    def finished(self) -> bool:
        """Whether it ended with a result."""
        return bool(self.summary)

    @property
    def session(self) -> dict[str, Any]:
        """The last stretch on one backend."""
        sessions = [s for s in self.manifest.get("sessions", []) if isinstance(s, dict)]
        return sessions[-1] if sessions else {}

    @property
    def warnings(self) -> list[str]:
        """What the run warned of; written at its end."""
        given = self.summary.get("warnings")
        return [clean(w) for w in given if isinstance(w, str)] if isinstance(given, list) else []

    def held_out(self, when: str) -> dict[str, Any]:
        """The evaluation line `before` or `after` training, empty without one."""
        line = mapping(mapping(self.summary.get("eval")).get(when))
        if line or not self.evals:
            return line
        line = self.evals[0 if when == "before" else -1]
        return line if (line["step"] == 0) == (when == "before") else {}


def read_run(folder: Path) -> Told:
    """The run in `folder`; what is missing or damaged is in its notes. Raises RunError, one line, if there is no run at all."""
    run = Run(folder)
    if not folder.is_dir():
        raise RunError(f"{folder}: {'is a file, not the folder of a run' if folder.exists() else 'no such folder'}. Name the folder that `upo train` wrote (--out).")
    found = [name for name in CONTENTS if (folder / name).exists()]
    if not {"config.yaml", "metrics.jsonl"}.intersection(found):
        inside = [path for path in folder.iterdir() if path.is_dir() and (path / "config.yaml").is_file()] if not found else []
        hint = f" It holds runs: {', '.join(sorted(str(path) for path in inside)[:4])}." if inside else " `upo train` and `upo quickstart` make one."
        raise RunError(f"{folder}: holds no run (neither config.yaml nor metrics.jsonl; found {', '.join(found) or 'none of its files'}).{hint}")
    notes: list[str] = []
    config, config_text = _config(folder, notes)
    manifest = _json(folder / "manifest.json", notes)
    if manifest and not is_manifest(manifest):
        notes.append("manifest.json is not a manifest of upo and is left out: no hashes, no versions, no planned length.")
        manifest = {}
    records, broken = _records(run)
    if broken:
        notes.append(f"metrics.jsonl: {broken} line{'s' * (broken > 1)} could not be read and {'are' if broken > 1 else 'is'} left out; {len(records)} are kept.")
    summary = _json(folder / "summary.json", notes, needed=False)
    told = Told(
        path=folder,
        name=clean(folder.resolve().name),
        config=config,
        config_text=config_text,
        manifest=manifest,
        steps=[r for r in records if not r.get("eval")],
        evals=[r for r in records if r.get("eval")],
        summary=summary,
        evaluation=read_evaluation(folder, None if config is None else _weights(config), notes),
        notes=notes,
    )
    if not told.finished:
        notes.insert(0, _unfinished(told, run))
    return told


def _unfinished(told: Told, run: Run) -> str:
    of = f" of {told.total}" if told.total else ""
    saved = run.last_step()
    kept = "no checkpoint was written yet" if saved is None else f"the newest checkpoint is of step {saved}"
    return f"This run has not ended: {told.done}{of} steps are in its metrics, {kept}. Go on with: {run.command}"


def _config(folder: Path, notes: list[str]) -> tuple[RunConfig | None, str]:
    path = folder / "config.yaml"
    if not path.is_file():
        notes.append("config.yaml is missing: what was trained, and how, is not known.")
        return None, ""
    try:
        config_text = path.read_text(encoding="utf-8", errors="replace")
        return load_config(path), config_text
    except OSError as error:
        notes.append(f"config.yaml: cannot be read ({error.strerror}).")
        return None, ""
    except ConfigError as error:
        notes.append(f"config.yaml is not one that this version of upo reads ({clean(str(error)).splitlines()[0]}); it is shown as it is.")
        return None, config_text


def _weights(config: RunConfig) -> dict[str, float]:
    """Label of each goal, as in results, -> its weight. No scorer is run."""
    found: dict[str, float] = {}
    for goal in config.objective.goals:
        found[unique_label(make_scorer(goal.scorer, goal.model_extra or {}), list(found))] = goal.weight
    return found


def _json(path: Path, notes: list[str], needed: bool = True) -> dict[str, Any]:
    """A JSON object; empty, with a note, if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if needed:
            notes.append(f"{path.name} is missing.")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read ({clean(str(error))}) and is left out.")
        return {}
    if not isinstance(content, dict):
        notes.append(f"{path.name} is not an object and is left out.")
        return {}
    return content


def _records(run: Run) -> tuple[list[dict[str, Any]], int]:
    """The readable lines of metrics.jsonl with a step, in order, and how many others there are."""
    if not run.metrics.is_file():
        return [], 0
    lines = sum(bool(line.strip()) for line in run.metrics.read_text(encoding="utf-8", errors="replace").splitlines())
    records = [r for r in run.records() if isinstance(r, Mapping) and type(r["step"]) is int and number(r["step"]) is not None]
    return records, lines - len(records)
