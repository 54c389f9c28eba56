"""Training and asking, one process after the other or several at once; what is done is left as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from paper_in_miniature.methods import METHODS, Settings, configuration
from paper_in_miniature.table import BASE

from upo.errors import RunError
from upo.training.files import write_text

HERE = Path(__file__).parent


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
    """All that is not done yet; returns {name of a job: why it failed}.

    The first seed of the methods with several goes alone: it fills the caches of references and rewards that the others use, and its
    steps are timed without company.
    """
    for folder in ("runs", "answers", "logs", "configs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    alone = [job for job in jobs if at_once == 1 or (job.seed == 0 and job.method != BASE and METHODS[job.method].seeded)]
    rest = [job for job in jobs if job not in alone]
    failed: dict[str, str] = {}
    for group, workers in ((alone, 1), (rest, at_once)):
        with ThreadPoolExecutor(workers) as pool:
            for job, why in zip(group, pool.map(lambda job: _run(job, settings, workers), group), strict=True):  # noqa: B023
                if why is not None:
                    failed[job.name] = why
    return failed


def _run(job: Job, settings: Settings, workers: int) -> str | None:
    """None, or why it failed."""
    file = job.out / "settings.json"
    try:
        if job.method != BASE and not (job.folder / "summary.json").exists():
            config = job.out / "configs" / f"{job.name}.yaml"
            write_text(config, configuration(job.method, job.seed, settings).dump())
            begun = all((job.folder / name).is_file() for name in ("config.yaml", "manifest.json"))
            before = int(job.beside.read_text(encoding="utf-8")) if begun and job.beside.exists() else 1
            write_text(job.beside, f"{max(before, workers)}\n")
            _call(job, "train", ["-m", "upo_cli", "train", str(config), "--out", str(job.folder), *(["--resume"] if begun else [])])
        if not job.answers.exists():
            run = [] if job.method == BASE else ["--run", str(job.folder)]
            _call(job, "answers", ["-m", "paper_in_miniature.answers", str(file), "--seed", str(job.seed), *run, "--out", str(job.answers)])
    except RunError as error:
        print(f"{job.name} failed: {error} The others go on.", file=sys.stderr, flush=True)
        return str(error)
    return None


def _call(job: Job, what: str, arguments: Sequence[str]) -> None:
    """Raises RunError with the last line that the process said."""
    print(f"+ {job.name}: {what}", file=sys.stderr, flush=True)
    path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    with job.log.open("a", encoding="utf-8") as log:
        code = subprocess.run([sys.executable, *arguments], stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": path}, check=False).returncode
    if code:
        said = job.log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"]
        raise RunError(f"{what} ended with code {code}, saying: {said[-1].strip()} (all of it: {job.log})")


def step_seconds(folder: Path) -> list[float]:
    """Of each step but the first, which warms up."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["seconds"] for line in lines if not line.get("eval")][1:]
