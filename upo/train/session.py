"""One run from configuration to result: prepared, trained, written down."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from upo import adapters
from upo.backend import Learner, choose, get_backend
from upo.config import RunConfig, load_config
from upo.train.identity import check_config, check_identity, run_identity
from upo.train.loop import Loop, Progress
from upo.train.manifest import first_manifest, session_entry
from upo.train.prepare import prepare
from upo.train.reference import (
    Reference,
    adapter_hash,
    cache_path,
    logps_of,
    pass_size,
    read_cached,
    reference_identity,
    with_reference,
)
from upo.train.reporter import Recorder, Reporter, Silent
from upo.train.run import Run
from upo.train.value import fit_value


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
        allow_code: bool = False,
        reporter: Reporter | None = None,
        learner: Learner | None = None,
        data: Any = None,
    ) -> None:
        self.progress, self.config, self.folder = Progress(), config, Run(Path(out))
        self.reporter = Recorder(Silent() if reporter is None or _early_rank() > 0 else reporter)
        self._manifest: dict[str, Any] = {}
        if resume:
            self.folder.check_resumable()
            self._manifest = self.folder.manifest()
            check_config(load_config(self.folder.path / "config.yaml"), config, self.folder.path)
        else:
            self.folder.check_new()
        self._prepared = prepare(config, allow_code=allow_code, reporter=self.reporter, data=data)
        self.objective, self.tokenizer, self.data = self._prepared.objective, self._prepared.tokenizer, self._prepared.data
        self.total_steps = self._prepared.total
        identity = run_identity(self._prepared)
        check_identity(self._manifest.get("identity", {}), identity, self.folder.path)
        self.backend = choose(config.backend)
        self.learner = learner if learner is not None else get_backend(config.backend).load(config)
        if self.learner.comm.rank > 0:
            self.reporter.inner = Silent()
        for note in self.learner.info.notes:
            self.reporter.info(note)
        self._identity = {**identity, "model": self.learner.info.weights_hash}
        check_identity(self._manifest.get("identity", {}), self._identity, self.folder.path)
        checkpoint = self.folder.newest(self.reporter) if resume else None
        if checkpoint is not None:
            seconds = checkpoint.seconds
            self.progress.step, self.progress.reference_s = checkpoint.step, seconds["reference"]
            self.progress.train_s, self.progress.earlier_s = seconds["train"], seconds["total"]
        self._references = self._score_reference()
        self.value_fit: dict[str, float] = {}
        if checkpoint is not None:
            self.learner.load_state(checkpoint.state())
            self.reporter.info(f"Going on after step {checkpoint.step} of {self.total_steps}.")
        elif self.objective.auxiliary is not None:
            self.value_fit = fit_value(self.learner, self._prepared.train, config.train.micro_batch_tokens, self.reporter)
            self.reporter.info("Value head fitted: " + ", ".join(f"{name} {value:.4g}" for name, value in self.value_fit.items()))

    def run(self) -> dict[str, Any]:
        """Train to the end and write the result. Returns what summary.json holds.

        Raises NonFiniteError, and KeyboardInterrupt after Ctrl-C, with the state saved.
        """
        writes = self.learner.comm.rank == 0
        self.learner.comm.all_sum(np.zeros(1, np.float32))  # every rank has looked at the folder before rank 0 writes to it
        kept = self.folder.truncate(self.progress.step) if self._manifest and writes else self.folder.records(self.progress.step)
        if writes:
            self._open()
        evaluations = [record for record in kept if record.get("eval")]
        try:
            Loop(self._prepared, self.learner, self.folder, self.reporter, self._starts_as_reference()).go(self.progress, evaluations)
        finally:
            if writes:
                self._manifest["sessions"][-1]["to_step"] = self.progress.step
                self.folder.write_json("manifest.json", self._manifest)
        summary = self._summary(evaluations)
        if writes:
            adapters.write_adapter(self.folder.path / "adapter", self.learner.state()["adapter"], self.learner.adapter_config(), overwrite=True)
            self.folder.write_json("summary.json", summary)
        return summary

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
            self.reporter.info(f"Reference ({split}): {pass_size(rows):,} completions {'from the cache' if found.cached else 'scored'}.")
            self._compare(split, found)
        self._prepared = replace(prepared, train=splits["train"], eval=splits["eval"])
        self.progress.reference_s += time.perf_counter() - began
        return keys

    def _compare(self, split: str, found: Reference) -> None:
        """Say by how much the reference moved, where a resumed run computes it on another backend, device or dtype."""
        old = self._manifest.get("reference", {}).get("keys", {}).get(split)
        if old is None or old == found.key:
            return
        now = logps_of(found.examples)
        before = read_cached(cache_path(old), len(now))
        moved = "the earlier ones are not in the cache" if before is None else f"largest difference to the earlier ones {np.max(np.abs(now - before)):.3g} nats"
        self.reporter.info(f"Reference ({split}): computed anew, as backend, device or dtype changed; {moved}.")

    def _starts_as_reference(self) -> bool:
        config = self.config
        if config.adapter.start is None or config.reference == "start":
            return config.reference in ("base", "start")
        return reference_identity(config) == adapter_hash(config.adapter.start)

    def _open(self) -> None:
        """Create the folder, or note in its manifest that another session goes on with it."""
        new = not self._manifest
        if new:
            self._manifest = first_manifest(self._prepared, self.learner, self._identity, self._references, self.value_fit)
        for session in self._manifest["sessions"]:  # steps that are done again are not theirs
            session["to_step"] = min(self.progress.step, self.progress.step if session["to_step"] is None else session["to_step"])
        self._manifest["sessions"].append(session_entry(self.backend, self.learner, self.progress.step))
        if self._references:
            self._manifest["reference"]["keys"] = self._references
        if new:
            self.folder.create(self.config.dump(), self._manifest)
        else:
            self.folder.sweep()
            self.folder.write_json("manifest.json", self._manifest)

    def _summary(self, evaluations: list[dict[str, Any]]) -> dict[str, Any]:
        seconds, rows = self.progress.seconds(), self._prepared.rows_before(self.total_steps)
        before, after = (evaluations[0], evaluations[-1]) if evaluations else (None, None)
        return {
            "rows": rows,
            "steps": self.total_steps,
            "reference_s": seconds["reference"],
            "train_s": seconds["train"],
            "total_s": seconds["total"],
            "rows_per_s": rows / max(seconds["reference"] + seconds["train"], 1e-9),
            "peak_memory_gb": float(self.learner.peak_memory_gb()),
            "eval": {"before": before, "after": after},
            "value_fit": self._manifest.get("value_fit", {}),
            "warnings": self.reporter.warnings,
        }


def _early_rank() -> int:
    """This process's rank before the model is loaded, as torchrun and mlx.launch say it; 0 on its own."""
    return next((int(value) for name in ("RANK", "MLX_RANK") if (value := os.environ.get(name, "")).isdigit()), 0)
