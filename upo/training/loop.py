"""The training loop: order, learning rate, evaluation, logging and checkpoints. It knows no framework."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from upo.backend import Learner
from upo.config import RunConfig
from upo.data.batch import Batch, collate
from upo.errors import NonFiniteError
from upo.flops import Work
from upo.training.checks import check_start
from upo.training.identity import position
from upo.training.interrupt import Interrupt
from upo.training.keep import Watch
from upo.training.metrics import evaluate, step_metrics
from upo.training.prepare import Prepared
from upo.training.reporter import Reporter
from upo.training.run import Run
from upo.training.schedule import lr_at
from upo.training.sinks import Sinks
from upo.training.work import batch_work, evaluation_work, figures

HEAVY = 10.0  # a mean actor weight above this means that a few completions decide the step


def train(
    config: RunConfig, out: Path | str, *, resume: bool = False, reschedule: bool = False, allow_code: bool = False, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Train as configured into the folder `out`, or go on with the run that is there. Returns what summary.json holds.

    `reschedule`: a resumed run may have another length or learning rates, used from its checkpoint on.

    Raises an UpoError for bad input, before the model is loaded where that can be known; KeyboardInterrupt after Ctrl-C, with the state
    saved and the command to go on reported.
    """
    from upo.training.session import Session  # it imports this module for the loop

    return Session(config, Path(out), resume=resume, reschedule=reschedule, allow_code=allow_code, reporter=reporter).run()


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0  # optimizer steps done
    reference_s: float = 0.0  # spent on the reference pass
    train_s: float = 0.0  # spent on optimizer steps, without evaluations and checkpoints
    earlier_s: float = 0.0  # spent on everything, before `began`
    began: float = field(default_factory=time.perf_counter)

    def seconds(self) -> dict[str, float]:
        """Time spent so far, over all sessions of the run."""
        return {"reference": self.reference_s, "train": self.train_s, "total": self.earlier_s + time.perf_counter() - self.began}


class Loop:
    """Steps through a prepared run. Only rank 0 writes to `run`.

    `evaluations`: the evaluation lines that metrics.jsonl holds already; new ones are added to it. `origin`: what every checkpoint notes
    about where it comes from. `saved`: called with the steps done and the folder of a new checkpoint, before older ones are removed.
    `same_start`: the policy starts as its reference, so step 1 checks that both are computed alike. `watch`: what evaluations decide.
    `fresh`: what an evaluation line holds besides, about answers sampled from the policy. `sinks`: also get every line.
    """

    def __init__(
        self,
        prepared: Prepared,
        learner: Learner,
        run: Run,
        reporter: Reporter,
        evaluations: list[dict[str, Any]],
        origin: Mapping[str, Any],
        saved: Callable[[int, Path], None],
        same_start: bool = False,
        watch: Watch | None = None,
        fresh: Callable[[], dict[str, float]] | None = None,
        sinks: Sinks | None = None,
    ) -> None:
        self.watch, self.fresh, self.sinks = watch or Watch(), fresh, sinks
        self.prepared, self.learner, self.run, self.reporter, self.same_start = prepared, learner, run, reporter, same_start
        self.config, self.objective, self.total = prepared.config, prepared.objective, prepared.total
        self.evaluation = collate(prepared.eval) if prepared.eval else None
        self.evaluations, self.origin, self.saved = evaluations, origin, saved
        self.writes = learner.comm.rank == 0
        self.ranks = learner.comm.size
        self.lines: list[dict[str, Any]] = []  # of the steps done here
        self._evaluation_work: tuple[Work, Work] | None = None  # the same each time
        self._heavy = False

    def go(self, progress: Progress) -> None:
        """Train to the end."""
        self.reporter.start("train", self.total - progress.step, "steps")
        try:
            with Interrupt(self.reporter) as interrupt:
                for step in range(progress.step, self.total):
                    self._evaluate(progress)
                    if self._ends_early(progress):
                        break
                    self._step(step, progress)
                    stop = interrupt.agreed(self.learner.comm)
                    if stop or self._save_due(progress.step):
                        self._save(progress)
                    if stop and progress.step < self.total:
                        raise KeyboardInterrupt
            self._evaluate(progress)
            self._prune(progress)
        except NonFiniteError as error:
            raise NonFiniteError(self._rescue(error, progress)) from None
        except KeyboardInterrupt:
            self._say_stopped(progress)
            raise

    def _step(self, step: int, progress: Progress) -> None:
        examples = self.prepared.rows_of(step)
        batch = collate(examples, step)
        lr = lr_at(self.config.optimizer, step, self.total)
        began = time.perf_counter()
        outcome = self.learner.step(batch, lr)
        seconds = time.perf_counter() - began
        if step == 0 and self.same_start and batch.ref_logp is not None:
            check_start(float(np.max(np.abs(outcome.logp - batch.ref_logp))), self.learner.info.dtype, self.reporter)
        progress.step = step + 1
        progress.train_s += seconds
        record = {
            "step": step + 1,
            "epoch": self.prepared.rows_before(step + 1) / len(self.prepared.train),
            **step_metrics(self.objective, batch, outcome),
            "lr": lr,
            "grad_norm": float(outcome.grad_norm),
            **({"value_grad_norm": float(outcome.value_grad_norm)} if self.objective.needs & {"value", "token_values"} else {}),
            **self._speed(batch, seconds),
            **figures(batch_work(batch, self.ranks, self.learner.info), self.learner.info, seconds, self.ranks, trained=True),
        }
        self._log(record)
        self.lines.append(record)
        self.reporter.advance(1)
        self._warn_heavy(record)

    def _evaluate(self, progress: Progress) -> None:
        step, every = progress.step, self.config.train.eval_every
        due = step in (0, self.total) or (every > 0 and step % every == 0)
        if self.evaluation is None or not due or any(line["step"] == step for line in self.evaluations):
            return
        began = time.perf_counter()
        found = evaluate(self.learner, self.objective, self.evaluation, step)
        seconds, info = time.perf_counter() - began, self.learner.info
        if self._evaluation_work is None:
            self._evaluation_work = evaluation_work(self.evaluation, self.ranks, info)
        work = figures(self._evaluation_work, info, seconds, self.ranks, trained=False)
        sampled = self.fresh() if self.fresh else {}
        record = {"step": step, "eval": True, **found, **self._speed(self.evaluation, seconds), **work, **sampled}
        self.evaluations.append(record)
        self._log(record)
        if self.watch.best_of(self.evaluations) is record:
            self._save(progress)

    def _ends_early(self, progress: Progress) -> bool:
        """Whether the evaluations say that it no longer gets better; the state is saved then."""
        stop = self.watch.stop
        if stop is None or not self.watch.stalled(self.evaluations):
            return False
        self.reporter.info(
            f"Stopped early after step {progress.step} of {self.total}: {stop.name} has not become better in {self.watch.patience} evaluations in a row."
        )
        self._save(progress)
        return True

    def _speed(self, batch: Batch, seconds: float) -> dict[str, float]:
        tokens = batch.count["token"] + sum(map(len, batch.forest.prompts))
        pace = max(seconds, 1e-9)
        return {
            "rows_per_s": len(batch.origins) / pace,
            "tokens_per_s": tokens / pace,
            "peak_memory_gb": float(self.learner.peak_memory_gb()),
            "seconds": seconds,
        }

    def _log(self, record: dict[str, Any]) -> None:
        if self.writes:
            self.run.append(record)
            if self.sinks is not None:
                self.sinks.log(record)
        self.reporter.metrics(record)

    def _warn_heavy(self, record: dict[str, Any]) -> None:
        if not self._heavy and record.get("weight/mean", 0.0) > HEAVY:
            self._heavy = True
            self.reporter.warn(
                f"Step {record['step']}: the actor's weights average {record['weight/mean']:.1f} (above {HEAVY:g}): a few completions decide the step. "
                "Lower objective.auxiliary.temperature, or raise objective.auxiliary.expectile or objective.auxiliary.value.fit_steps."
            )

    def _save_due(self, step: int) -> bool:
        every = self.config.train.save_every
        return step == self.total or (every > 0 and step % every == 0)

    def _save(self, progress: Progress, prune: bool = True) -> None:
        if not self.writes:
            return
        chosen = self.config.optimizer
        schedule = {"name": chosen.schedule, "lr": chosen.lr, "warmup_steps": chosen.warmup_steps, "steps": self.total}
        origin = {**self.origin, "schedule": schedule, "order": position(self.prepared, progress.step)}
        folder = self.run.save(progress.step, self.learner.state(), self.learner.adapter_config(), progress.seconds(), origin)
        self.saved(progress.step, folder)
        if prune:
            self._prune(progress)

    def _prune(self, progress: Progress) -> None:
        best = self.watch.best_of(self.evaluations)
        if self.writes:
            self.run.prune(progress.step, self.config.train.keep_checkpoints, [] if best is None else [best["step"]])

    def _rescue(self, error: NonFiniteError, progress: Progress) -> str:
        """Save the state before the bad step, beside the regular checkpoints, and say what can be done."""
        self._save(progress, prune=False)
        folder = self.run.checkpoint_folder(progress.step)
        return f"{error} The state after step {progress.step} is saved in {folder}: a new run goes on from it, or from an earlier one, by adapter.start."

    def _say_stopped(self, progress: Progress) -> None:
        saved = self.run.last_step(progress.step)
        where = "no checkpoint was written yet" if saved is None else f"the state after step {saved} is saved"
        self.reporter.warn(f"Stopped after step {progress.step} of {self.total}; {where}. Go on with: {self.run.command}")

