"""What every contender's process reports to the driver. Standard library only: the peers run it in environments of their own."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("upo", "torch", "transformers", "peft", "trl", "accelerate", "mlx", "mlx-lm", "mlx-lm-lora", "numpy")


class Stopwatch:
    """Collects one run: when the work began, how long the reference and each step took, and what they gave."""

    def __init__(self, synchronise: Callable[[], None] = lambda: None) -> None:
        self.synchronise = synchronise  # waits for what a device still computes
        self.work: float | None = None  # wall-clock time at which the first reference pass or step began
        self.first_step: float | None = None  # and at which the first optimizer step was done
        self.reference_s = 0.0  # all of it
        self.reference_in_steps_s = 0.0  # the part that `steps_s` includes
        self.steps_s: list[float] = []
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.tokens: dict[str, Any] = {}
        self.notes: list[str] = []
        self.found: dict[str, Any] = {}
        self._in_steps = False
        self._mark = 0.0

    def begins(self) -> None:
        """The reference pass, or the first step, begins."""
        if self.work is None:
            self.work = time.time()

    def training(self) -> None:
        """The first step begins."""
        self.begins()
        self._in_steps, self._mark = True, time.perf_counter()

    def step(self) -> None:
        """A step is done; it took the time since the last one, or since `training`."""
        self.synchronise()
        now = time.perf_counter()
        self.took(now - self._mark)
        self._mark = now

    def took(self, seconds: float) -> None:
        """A step is done, and took so long."""
        self.steps_s.append(seconds)
        self.first_step = self.first_step or time.time()

    @contextmanager
    def reference(self):
        """A part of the reference pass."""
        self.begins()
        self.synchronise()
        began = time.perf_counter()
        yield
        self.synchronise()
        seconds = time.perf_counter() - began
        self.reference_s += seconds
        self.reference_in_steps_s += seconds if self._in_steps else 0.0

    def rows(self, rows: Sequence[Sequence[Sequence[int]]]) -> None:
        """The token ids of every row, in the order in which they are trained on: prompt, then its completions."""
        ids = [[[int(t) for t in part] for part in row] for row in rows]
        self.tokens = {
            "rows": len(ids),
            "prompt": sum(len(row[0]) for row in ids),
            "completion": sum(len(part) for row in ids for part in row[1:]),
            "sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        }

    def result(self) -> dict[str, Any]:
        return {
            "work": self.work,
            "first_step": self.first_step,
            "reference_s": self.reference_s,
            "reference_in_steps_s": self.reference_in_steps_s,
            "steps_s": self.steps_s,
            "losses": self.losses,
            "grad_norms": self.grad_norms,
            "tokens": self.tokens,
            "notes": self.notes,
            "versions": {name: version for name in PACKAGES if (version := _version(name))},
            **self.found,
        }


def contend(run: Callable[[dict[str, Any]], Stopwatch]) -> None:
    """`python CONTENDER JOB RESULT`: read the job, run it, write the result."""
    job, result = map(Path, sys.argv[1:3])
    watch = run(json.loads(job.read_text(encoding="utf-8")))
    result.write_text(json.dumps(watch.result()), encoding="utf-8")


def read_rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
