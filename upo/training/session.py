"""One run from configuration to result: prepared, trained, written down."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from upo.backend import Learner, choose, get_backend
from upo.config import RunConfig, load_config
from upo.data.control import Control
from upo.errors import ConfigError, RunError
from upo.evaluation.goals import Fresh, goals_of, questions_of
from upo.sharing import row_of
from upo.training.checkpoint import Checkpoint
from upo.training.identity import check_config, check_identity, differences, position, run_identity, with_keys
from upo.training.inputs import Inputs, inputs_of, read_inputs
from upo.training.keep import watch_of
from upo.training.loop import Loop, Progress
from upo.training.manifest import cut_sessions, done_by, first_manifest, session_entry
from upo.training.prepare import prepare
from upo.training.prompts import with_embeddings
from upo.training.reference import adapter_hash, logps_of, pass_size, reference_identity, with_reference
from upo.training.reporter import Recorder, Reporter, Silent
from upo.training.run import Run
from upo.training.schedule import lr_at
from upo.training.sinks import Sinks
from upo.training.value import fit_value
from upo.training.work import averages


class Session:
    """A prepared run: data read, model loaded, reference scored, value head fitted; or, resumed, the newest checkpoint loaded.

    What fails, fails in the constructor and as early as it can be known: the folder, the rewards, the tokenizer, the rows, then the model.
    Nothing is written to `out` before `run`. `learner` and `data` (anything with `train` and `eval`, lists of examples) stand in for the
    model and the files of the configuration.
    """

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        *,
        resume: bool = False,
        reschedule: bool = False,
        allow_code: bool = False,
        reporter: Reporter | None = None,
        learner: Learner | None = None,
        data: Any = None,
    ) -> None:
        self.progress, self.config, self.folder = Progress(), config, Run(Path(out))
        self.reporter = Recorder(Silent() if reporter is None or _early_rank() > 0 else reporter)
        self._manifest: dict[str, Any] = {}
        self._earlier: RunConfig | None = None
        self._changed: dict[str, tuple[Any, Any]] = {}
        if resume:
            self._read_run(reschedule)
        elif reschedule:
            raise RunError("--reschedule: changes a run that is resumed. Add --resume, or leave it out.")
        else:
            self.folder.check_new()
        self._sinks = Sinks(config.log, self.reporter)
        self._prepared = prepare(config, allow_code=allow_code, reporter=self.reporter, data=data)
        self.objective, self.tokenizer, self.data = self._prepared.objective, self._prepared.tokenizer, self._prepared.data
        self.total_steps = self._prepared.total
        self._goals = goals_of(config, allow_code, self.reporter, self._prepared.goals) if self._samples() else []
        weights = {goal.label: goal.weight for goal in self._goals}
        self._watch = watch_of(config, self.objective, self._prepared.eval, weights if config.evaluation.prompts else None)
        if resume:
            self._check_not_ended()
        self._inputs = inputs_of(self._prepared.train, self._prepared.eval, self.objective.columns)
        self._noted = read_inputs(self.folder.path) if resume else Inputs()
        self._identity = run_identity(self._prepared, self._inputs)
        self._check_identity()
        checkpoint = self._newest() if resume else None
        if self._manifest:
            cut_sessions(self._manifest, self.progress.step)
        self.backend = choose(config.backend)
        self.learner = learner if learner is not None else get_backend(config.backend).load(config)
        if self.learner.comm.rank > 0:
            self.reporter.inner = Silent()
        self.learner.check_sharing(row_of(self._prepared.train))  # the layout is part of the reference's key
        for note in self.learner.info.notes:
            self.reporter.info(note)
        self._identity["model"] = self.learner.info.weights_hash
        self._check_identity(checkpoint)
        self._references = self._score_reference()
        self.value_fit: dict[str, float] = {}
        if checkpoint is not None:
            self.learner.load_state(checkpoint.state())
            self.reporter.info(f"Going on after step {checkpoint.step} of {self.total_steps} ({done_by(self._manifest)}).")
        elif self.objective.needs & {"value", "token_values"}:
            self.value_fit = fit_value(self.learner, self._prepared.train, self.reporter)
            self.reporter.info("Value head fitted: " + ", ".join(f"{name} {value:.4g}" for name, value in self.value_fit.items()))

    def run(self) -> dict[str, Any]:
        """Train to the end and write the result. Returns what summary.json holds.

        Raises NonFiniteError, and KeyboardInterrupt after Ctrl-C, with the state saved.
        """
        writes = self.learner.comm.rank == 0
        self.learner.comm.all_sum(np.zeros(1, np.float32))  # every rank has looked at the folder before rank 0 writes to it
        kept = self.folder.truncate(self.progress.step) if self._manifest and writes else self.folder.records(self.progress.step)
        if writes:
            self._say_lost({record["step"] for record in kept if not record.get("eval")})
            self._open()
            self._sinks.start(self.config.model_dump(mode="json"), self._manifest)
        evaluations = [record for record in kept if record.get("eval")]
        origin = {"identity": self._identity, "random": {"seed": self.config.train.seed}, "reference": self._references}
        start, fresh = self._starts_as_reference(), self._fresh()
        loop = Loop(self._prepared, self.learner, self.folder, self.reporter, evaluations, origin, self._note, start, self._watch, fresh, self._sinks)
        try:
            loop.go(self.progress)
        except BaseException:
            with contextlib.suppress(RunError):  # where the disk is full, what stopped the run is the better message
                self._note(self.progress.step)
            if writes:
                self._sinks.finish(None)
            raise
        summary = self._summary(evaluations, averages([*kept, *loop.lines]))
        if writes:
            self._note(self.progress.step)
            self.folder.write_result(self.learner.state()["adapter"], self.learner.adapter_config())
            self.folder.write_json("summary.json", summary)
            self._sinks.finish(summary)
        return summary

    # --- Answers while it trains --------------------------------------------------------------------------------------------------

    def _samples(self) -> bool:
        """Whether evaluations sample answers. Raises ConfigError where there is nothing to answer."""
        wanted = self.config.evaluation.prompts > 0
        if wanted and not self._prepared.eval:
            raise ConfigError("evaluation.prompts: there are no held-out rows whose prompts could be answered. Give data.eval, or set it to 0.")
        return wanted

    def _fresh(self) -> Fresh | None:
        options = self.config.evaluation
        if not options.prompts:
            return None
        assert self.tokenizer is not None  # always there where the configuration names the files
        questions = questions_of(self._prepared.eval, options.prompts, Control.of(self.config.data.control, self.tokenizer))
        return Fresh(self.learner, self.tokenizer, questions, options, self._goals, self.config.train.seed, self.reporter)

    # --- On with a run ------------------------------------------------------------------------------------------------------------

    def _read_run(self, reschedule: bool) -> None:
        """What is there of the run to go on with; refuses another configuration, and a run that is finished."""
        self.folder.check_resumable()
        self._manifest = self.folder.manifest()
        self._earlier = load_config(self.folder.path / "config.yaml")
        self._changed = check_config(self._earlier, self.config, self.folder.path, reschedule)
        if not self._changed:
            self.folder.check_unfinished(self._manifest["steps"])

    def _check_not_ended(self) -> None:
        """Refuse a run that ended early, if by this configuration it still would."""
        stop = self._watch.stop
        if stop is not None and self.folder.has_summary and self._watch.stalled([r for r in self.folder.records() if r.get("eval")]):
            raise RunError(
                f"--resume: the run in {self.folder.path} ended early, as {stop.name} had not become better in {self._watch.patience} evaluations in a row; its "
                f"result is {self.folder.path / 'adapter'}. To go on with it, raise train.early_stopping.patience (--set), or start a new run with adapter.start."
            )

    def _newest(self) -> Checkpoint | None:
        """The checkpoint to go on from, the progress set to where it stands; None if the run had none yet."""
        checkpoint = self.folder.newest(self.reporter)
        latest, found = self._manifest.get("latest"), None if checkpoint is None else checkpoint.folder.name
        if checkpoint is None:
            if latest is not None:
                raise RunError(f"--resume: {self.folder.path / 'checkpoints'} is empty, and the run had written {latest}. Copy it from where the run was made.")
            return None
        if latest is not None and not (self.folder.path / "checkpoints" / str(latest)).exists():
            self.reporter.warn(f"The newest checkpoint of this run, {latest}, is not here. Going on from {found}.")
        step, order = checkpoint.step, position(self._prepared, checkpoint.step)
        if checkpoint.origin.get("order") != order:
            raise RunError(f"{checkpoint.folder}: written at another place in the order of the rows ({checkpoint.origin.get('order')}; this run: {order}).")
        if step > self.total_steps:
            raise RunError(f"--resume: {step} steps are done, more than the {self.total_steps} of the new train.epochs or train.steps.")
        self.progress.step, self.progress.reference_s = step, checkpoint.seconds["reference"]
        self.progress.train_s, self.progress.earlier_s = checkpoint.seconds["train"], checkpoint.seconds["total"]
        self._say_changed(step)
        return checkpoint

    def _say_changed(self, step: int) -> None:
        for key, (before, after) in self._changed.items():
            self.reporter.info(f"{key}: {before} until step {step}, {after} from there on.")
        if self._changed and self._earlier is not None:
            total = self._manifest["steps"]
            then, now = lr_at(self._earlier.optimizer, step, total), lr_at(self.config.optimizer, step, self.total_steps)
            rates = f"; the learning rate of step {step + 1} is {now:.3g}, and would have been {then:.3g}" if step < min(total, self.total_steps) else ""
            self.reporter.info(f"The run has {self.total_steps} steps instead of {total}{rates}.")

    def _check_identity(self, checkpoint: Checkpoint | None = None) -> None:
        """Refuse a run, or a checkpoint among those of the run, that was made of something else. Before the model is loaded: all but that."""
        made_of = [(self._manifest["identity"], self.folder.path)] if self._manifest else []
        if checkpoint is not None:
            made_of.append((checkpoint.origin.get("identity", {}), checkpoint.folder))
        details = differences(self._noted, self._inputs, self._prepared) if made_of else {}
        for old, folder in made_of:
            expected = {name: value for name, value in old.items() if name != "model" or name in self._identity}
            if details["rewards"] == "" and "rewards" in self._identity:
                expected["rewards"] = self._identity["rewards"]
            check_identity(expected, self._identity, folder, details)

    def _say_lost(self, steps: set[int]) -> None:
        lost = [step for step in range(1, self.progress.step + 1) if step not in steps]
        if lost:
            self.reporter.warn(f"{self.folder.metrics}: {len(lost)} of {self.progress.step} steps are missing (the first is {lost[0]}); they cannot be made again.")

    # --- The reference ------------------------------------------------------------------------------------------------------------

    def _score_reference(self) -> dict[str, str]:
        """Give the rows their reference log-probs; returns the cache key of each split."""
        if "reference" not in self.objective.needs:
            return {}
        keys, began, prepared = {}, time.perf_counter(), self._prepared
        splits = {"train": prepared.train, "eval": prepared.eval}
        for split, rows in splits.items():
            if not rows:
                continue
            found = with_reference(self.config, self.learner, self.backend, rows, split, self.reporter)
            splits[split], keys[split] = found.examples, found.key
            size = pass_size(self.config, rows)
            cached = f", the other {size - found.scored:,} from the cache" if 0 < found.scored < size else ""
            self.reporter.info(f"Reference ({split}): {found.scored or size:,} completions {'scored' if found.scored else 'from the cache'}{cached}.")
        if "distance" in self.objective.needs:
            splits["train"], splits["eval"] = with_embeddings(self.learner, splits["train"], splits["eval"], self.reporter)
        self._prepared = replace(prepared, train=splits["train"], eval=splits["eval"])
        self.progress.reference_s += time.perf_counter() - began
        self._inputs = replace(self._inputs, reference={split: logps_of(splits[split]) for split in keys})
        for split, key in keys.items():
            self._compare(split, key)
        return keys

    def _compare(self, split: str, key: str) -> None:
        """Say by how much the reference moved, where a resumed run computes it on another backend, device, dtype or machine."""
        old = self._manifest.get("reference", {}).get("keys", {}).get(split)
        if old is None:
            return
        before, now = self._noted.reference.get(split), self._inputs.reference[split]
        moved = float(np.max(np.abs(now - before), initial=0)) if before is not None and before.shape == now.shape else None
        if old != key or moved:
            why = "as backend, device or dtype changed" if old != key else "on a machine that rounds otherwise"
            shown = "the earlier values are lost" if moved is None else f"largest difference to the earlier ones {moved:.3g} nats"
            self.reporter.info(f"Reference ({split}): computed anew, {why}; {shown}.")

    def _starts_as_reference(self) -> bool:
        config = self.config
        if config.adapter.start is None or config.references[0] == "start":
            return config.references[0] in ("base", "start")
        return reference_identity(config).partition(", ")[0] == adapter_hash(config.adapter.start)

    # --- Writing it down ----------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Create the folder, or note in its manifest that another session goes on with it."""
        entry = session_entry(self.backend, self.learner, self.progress.step)
        if not self._manifest:
            self._manifest = first_manifest(self._prepared, self.learner, self._identity, self._references, self.value_fit)
            self._manifest["name"] = self.folder.path.resolve().name
            self._manifest["sessions"].append(entry)
            self.folder.create(self.config.dump(), self._manifest, self._inputs)
            return
        if self._changed:
            entry["changed"] = {key: list(values) for key, values in self._changed.items()}
        self._manifest["sessions"].append(entry)
        self._manifest["steps"], self._manifest["reference"]["keys"] = self.total_steps, self._references
        self.folder.sweep()
        self.folder.write_inputs(self._inputs)
        self.folder.write_json("manifest.json", self._manifest)
        if self._changed and self._earlier is not None:
            self.folder.write("config.yaml", with_keys(self._earlier, self.config, list(self._changed)).dump())

    def _note(self, step: int, checkpoint: Path | None = None) -> None:
        """Say in the manifest how far this session is, and which checkpoint is the newest."""
        if self.learner.comm.rank > 0:
            return
        self._manifest["sessions"][-1]["to_step"] = step
        if checkpoint is not None:
            self._manifest["latest"] = checkpoint.name
        self.folder.write_json("manifest.json", self._manifest)

    def _summary(self, evaluations: list[dict[str, Any]], work: Mapping[str, Any]) -> dict[str, Any]:
        seconds, done = self.progress.seconds(), self.progress.step
        rows = self._prepared.rows_before(done)
        before, after = (evaluations[0], evaluations[-1]) if evaluations else (None, None)
        best, early = self._watch.best_of(evaluations), self._watch.stop if done < self.total_steps else None
        return {
            "rows": rows,
            "steps": done,
            **({} if early is None else {"ended_early": {"metric": early.name, "of_steps": self.total_steps}}),
            "reference_s": seconds["reference"],
            "train_s": seconds["train"],
            "total_s": seconds["total"],
            "rows_per_s": rows / max(seconds["reference"] + seconds["train"], 1e-9),
            **work,
            "peak_memory_gb": float(self.learner.peak_memory_gb()),
            "eval": {"before": before, "after": after},
            **({} if best is None else {"best": {"checkpoint": str(self.folder.checkpoint_folder(best["step"])), **best}}),
            "value_fit": self._manifest.get("value_fit", {}),
            "warnings": self.reporter.warnings,
        }


def _early_rank() -> int:
    """This process's rank before the model is loaded, as torchrun and mlx.launch say it; 0 on its own."""
    return next((int(value) for name in ("RANK", "MLX_RANK") if (value := os.environ.get(name, "")).isdigit()), 0)
