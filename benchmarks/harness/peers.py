"""The peers' own environments, made once, and the header that says on what was measured."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from harness.runs import Failed, Pythons, Run

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
PEERS = {
    "trl": ("trl==1.16.0", "torch", "peft", "transformers", "accelerate", "datasets"),
    "mlx-lm-lora": ("mlx-lm-lora==5.10.2", "mlx[cpu]" if sys.platform == "linux" else "mlx"),
}


def pythons(folder: Path, programs: Iterable[str]) -> Pythons:
    """The interpreters of the programs; what is missing is installed with the versions of constraints.txt. Raises Failed."""
    found = {}
    for program in programs:
        found[program] = str(_environment(folder / program, PEERS[program])) if program in PEERS else sys.executable
    return Pythons(found, _blas() if "mlx-lm-lora" in found else "")


def _environment(folder: Path, packages: tuple[str, ...]) -> Path:
    python = folder / "bin" / "python"
    done = folder / "installed"
    if not done.exists():
        print(f"+ {', '.join(packages)} into {folder}", file=sys.stderr, flush=True)
        for command in ([sys.executable, "-m", "venv", str(folder)], [str(python), "-m", "pip", "install", "-q", "-c", str(CONSTRAINTS), *packages]):
            if subprocess.run(command, check=False).returncode != 0:
                raise Failed(f"{folder}: {' '.join(command)} failed. Install it by hand, then touch {done}.")
        done.touch()
    return python


def _blas() -> str:
    """The library that upo_mlx would load before mlx; the peer's process loads the same one. Empty where MLX needs none."""
    asked = subprocess.run([sys.executable, "-c", "from upo_mlx.device import BLAS; print(BLAS)"], capture_output=True, text=True, check=False)
    path = asked.stdout.strip()
    return path if path.endswith(tuple(".so" + end for end in ("", ".0", ".1", ".2", ".3"))) else ""


def machine() -> str:
    """The machine in a line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = ", ".join(f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    limit = f" ({threads})" if threads else ""
    return f"{_processor()}, {cores} cores{limit}, {memory:.0f} GB, {platform.system()} {platform.machine()}, Python {platform.python_version()}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                flags = " with AMX" if "amx_bf16" in cpuinfo.read_text(encoding="utf-8") else ""
                return line.partition(":")[2].strip() + flags
    return platform.processor() or platform.machine()


def versions(runs: Iterable[Run]) -> str:
    """Name and version of everything that took part, each once."""
    found: dict[str, str] = {}
    for run in runs:
        found.update(run.versions)
    return ", ".join(f"{name} {version}" for name, version in sorted(found.items()))


def header(runs: Iterable[Run]) -> str:
    """Machine and versions, above every table."""
    return f"Machine: {machine()}.  \nVersions: {versions(runs)}.\n"
