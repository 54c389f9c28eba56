"""Training and asking, one process after the other or several at once; what is done is left as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from paper_in_miniature.methods import METHODS, Settings, configuration
from paper_in_miniature.table import BASE

from upo.errors import RunError, UpoError
from upo.training.files import write_text

HERE = Path(__file__).parent
STOPPED = 130  # exit code of a process that Ctrl-C ended


@dataclass(frozen=True)
class Job:
    """One run and the answers of its result; of the base model, the answers alone."""

    method: str
    seed: int
    out: Path

    @property
    def name(self) -> str:
        return f"{self.method}-{self.seed}"

    @property
    def folder(self) -> Path:
        return self.out / "runs" / self.name

    @property
    def answers(self) -> Path:
        return self.out / "answers" / f"{self.name}.json"

    @property
    def beside(self) -> Path:
        """Says how many runs trained at once."""
        return self.out / "runs" / f"{self.name}.jobs"

    @property
    def log(self) -> Path:
        return self.out / "logs" / f"{self.name}.txt"


def jobs_of(names: Sequence[str], seeds: int, out: Path) -> list[Job]:
    """The base model and all runs of these methods, the first seed of each first."""
    runs = [Job(name, seed, out) for seed in range(seeds) for name in names if seed == 0 or METHODS[name].seeded]
    return [*(Job(BASE, seed, out) for seed in range(seeds)), *runs]


def run_jobs(jobs: Sequence[Job], settings: Settings, out: Path, at_once: int) -> dict[str, str]:
    """All that is not done yet; returns {name of a job: why it failed}."""
    for folder in ("runs", "answers", "logs", "configs"):
        (out / folder).mkdir(parents=True, exist_ok=True)

    def both(job: Job) -> None:
        _train(job, settings, at_once)
        _ask(job, at_once)

    return _all(jobs, at_once, both)


def _all(jobs: Sequence[Job], at_once: int, work: Callable[[Job], None]) -> dict[str, str]:
    """{name of a job: why it failed}."""

    def one(job: Job) -> str | None:
        try:
            work(job)
        except UpoError as error:
            print(f"{job.name} failed: {error} The others go on.", file=sys.stderr, flush=True)
            return str(error)
        return None

    with ThreadPoolExecutor(at_once) as pool:
        return {job.name: why for job, why in zip(jobs, pool.map(one, jobs), strict=True) if why is not None}


def _train(job: Job, settings: Settings, at_once: int) -> None:
    """Raises RunError."""
    if job.method == BASE or (job.folder / "summary.json").exists():
        return
    config = job.out / "configs" / f"{job.name}.yaml"
    write_text(config, configuration(job.method, job.seed, settings).dump())
    begun = all((job.folder / name).is_file() for name in ("config.yaml", "manifest.json"))
    before = int(job.beside.read_text(encoding="utf-8")) if begun and job.beside.exists() else 1
    write_text(job.beside, f"{max(before, at_once)}\n")
    _call(job, "train", ["-m", "upo_cli", "train", str(config), "--out", str(job.folder), *(["--resume"] if begun else [])], at_once)


def _ask(job: Job, at_once: int) -> None:
    """Raises RunError."""
    if not job.answers.exists():
        run = [] if job.method == BASE else ["--run", str(job.folder)]
        _call(job, "answers", ["-m", "paper_in_miniature.answers", str(job.out / "settings.json"), "--seed", str(job.seed), *run, "--out", str(job.answers)], at_once)


def _call(job: Job, what: str, arguments: Sequence[str], at_once: int) -> None:
    """Raises RunError with the last line that the process said, KeyboardInterrupt where Ctrl-C ended it."""
    print(f"+ {job.name}: {what}", file=sys.stderr, flush=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))}
    if at_once > 1:  # each process would take all cores, and they would slow one another out of proportion
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
    with job.log.open("a", encoding="utf-8") as log:
        code = subprocess.run([sys.executable, *arguments], stdout=log, stderr=log, env=environment, check=False).returncode
    if code == STOPPED:
        raise KeyboardInterrupt
    if code:
        said = job.log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"]
        raise RunError(f"{what} ended with code {code}, saying: {said[-1].strip()} (all of it: {job.log})")


def step_seconds(folder: Path) -> list[float]:
    """Of each step but the first, which warms up."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["seconds"] for line in lines if not line.get("eval")][1:]
