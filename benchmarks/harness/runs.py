"""One process for every measured run, so that its peak memory is its own; runs of several contenders alternate; what is there is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.work import Work

CONTENDERS = Path(__file__).parents[1] / "contenders"
SCRIPTS = {"upo": "upo_run.py", "trl": "trl_run.py", "mlx-lm-lora": "mlx_lm_lora_run.py", "upo-objective": "upo_objective.py"}


@dataclass(frozen=True)
class Contender:
    """A program (`SCRIPTS`) with its settings. `after`: the contender whose reference cache it finds, in the same repeat."""

    name: str
    program: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    after: str | None = None

    @property
    def folder(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.name.lower())


@dataclass(frozen=True)
class Run:
    """What one process did. Seconds and GB; rows are pairs, or groups where the work has groups."""

    contender: str
    rows: int
    wall_s: float
    start_s: float  # from the start of the process to the first reference pass or step
    first_step_s: float  # from the start of the process to the end of the first step
    reference_s: float
    reference_in_steps_s: float
    steps_s: tuple[float, ...]
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    peak_memory_gb: float  # of the process on a CPU, of the allocator on a GPU
    tokens: Mapping[str, Any]
    versions: Mapping[str, str]
    setup: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def work_s(self) -> float:
        """Seconds of reference pass and steps."""
        return self.reference_s - self.reference_in_steps_s + sum(self.steps_s)

    @property
    def rows_per_s(self) -> float:
        """With the reference pass."""
        return self.rows / self.work_s

    @property
    def rows_per_s_steps(self) -> float | None:
        """Without it; None where it cannot be told from the step (mlx-lm-lora)."""
        return self.rows / (sum(self.steps_s) - self.reference_in_steps_s) if self.reference_s else None


@dataclass(frozen=True)
class Pythons:
    """The interpreter of each program, and the BLAS that all MLX processes on Linux load."""

    of: Mapping[str, str]
    blas: str = ""


class Failed(Exception):
    """A measurement cannot be made; says why."""


class Ended(Failed):
    """A contender's process ended with an error; says where its output is."""


def measure(contender: Contender, work: Work, folder: Path, pythons: Pythons, caches: Path | None = None) -> Run:
    """Run a contender in a process of its own, or read what an earlier call found. Raises Failed, also where that was other work."""
    result, asked = folder / "run.json", {**asdict(work), "settings": dict(contender.settings), "env": dict(contender.env)}
    if result.exists():
        done = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        if different := sorted(name for name in asked if done.get(name) != asked[name]):
            raise Failed(f"{folder}: holds a run with other {', '.join(different)}. Name another --out.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        _spawn(contender, asked, folder, pythons, caches or folder / "cache")
    found = json.loads(result.read_text(encoding="utf-8"))
    return Run(**{**found, **{name: tuple(found[name]) for name in ("steps_s", "losses", "grad_norms", "notes")}})


def _spawn(contender: Contender, asked: dict[str, Any], folder: Path, pythons: Pythons, caches: Path) -> None:
    job, raw, log = (folder / name for name in ("job.json", "result.json", "log.txt"))
    out = next(path for n in range(1000) if not (path := folder / f"out-{n}").exists())  # an earlier try may have left one
    job.write_text(json.dumps({**asked, "out": str(out)}, indent=2), encoding="utf-8")
    raw.unlink(missing_ok=True)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "TOKENIZERS_PARALLELISM": "false", "UPO_CACHE": str(caches), "BENCHMARK_BLAS": pythons.blas}
    env = {**os.environ, **offline, **contender.env}
    if not contender.program.startswith("upo"):
        env.pop("PYTHONPATH", None)  # nothing of ours in the peers' environments
    command = [pythons.of[contender.program], str(CONTENDERS / SCRIPTS[contender.program]), str(job), str(raw)]
    print(f"+ {contender.name}  ({folder})", file=sys.stderr, flush=True)
    with log.open("w", encoding="utf-8") as output:
        began = time.time()
        process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        wall = time.time() - began
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0 or not raw.exists():
        last = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()][-3:]
        raise Ended(f"{contender.name} failed with {process.returncode}; its output is in {log}: {' | '.join(last)}")
    found = json.loads(raw.read_text(encoding="utf-8"))
    resident = usage.ru_maxrss / 1e9 if sys.platform == "darwin" else usage.ru_maxrss * 1024 / 1e9  # bytes on macOS, KiB on Linux
    run = Run(
        contender=contender.name,
        rows=asked["pairs"],
        wall_s=wall,
        start_s=found["work"] - began,
        first_step_s=found["first_step"] - began,
        reference_s=found["reference_s"],
        reference_in_steps_s=found["reference_in_steps_s"],
        steps_s=found["steps_s"],
        losses=found["losses"],
        grad_norms=found["grad_norms"],
        peak_memory_gb=found.get("device_memory_gb", resident),
        tokens=found["tokens"],
        versions=found["versions"],
        setup={**found.get("setup", {}), **({"GFLOP/s float32": round(found["gflops_float32"])} if "gflops_float32" in found else {})},
        notes=found["notes"],
    )
    (folder / "run.json").write_text(json.dumps(asdict(run), indent=2), encoding="utf-8")


def interleaved(contenders: Sequence[Contender], work: Work, folder: Path, pythons: Pythons, repeats: int) -> dict[str, list[Run]]:
    """The runs of each contender, by name: A B C, A B C, ... so that what the machine does meanwhile hits all alike."""
    found: dict[str, list[Run]] = {c.name: [] for c in contenders}
    by_name = {c.name: c for c in contenders}
    for repeat in range(repeats):
        for contender in contenders:
            here = folder / contender.folder / f"{repeat}"
            caches = folder / by_name[contender.after].folder / f"{repeat}" / "cache" if contender.after else None
            found[contender.name].append(measure(contender, work, here, pythons, caches))
    return found


def same_tokens(runs: Sequence[Run]) -> None:
    """Raises Failed unless all runs trained on the same token ids in the same order."""
    for run in runs:
        if run.tokens != runs[0].tokens:
            raise Failed(f"{run.contender} did not train on the rows of {runs[0].contender}: {run.tokens} instead of {runs[0].tokens}")
