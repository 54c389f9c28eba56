"""Runs that end in the middle: a process that trains on request and, at a named place or moment, is gone as if the power had failed.

`Trainer(backend)` starts one process that has the framework loaded and forks for every run, so that a run of a tiny model takes a second.
The product knows nothing of it: fail-points are put around its functions in the forked child, which then sends itself SIGKILL.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

TIMES = ("rows_per_s", "tokens_per_s", "seconds", "peak_memory_gb", "mfu")


# --- In the test ------------------------------------------------------------------------------------------------------------------


class Trainer:
    """The process that trains; `train` waits for one run and returns how it ended."""

    def __init__(self, backend: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, backend], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )

    def train(self, config: dict[str, Any], out: Path, *, resume: bool = False, fail: str | None = None, nth: int = 1, after: float | None = None, cache: str | None = None) -> dict:
        """Train `config` into `out`. Returns {"signal": 9 or 0, "error": last line, "seconds": s, "infos": [...]}.

        `fail`: die the `nth` time the run comes to this place (FAILPOINTS). `after`: be killed from outside so many seconds after the start. `cache`: another folder for what is kept between runs.
        """
        assert self.process.stdin and self.process.stdout
        job = {"config": config, "out": str(out), "resume": resume, "fail": fail, "nth": nth, "after": after, "cache": cache}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the training process ended"
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without what differs between two runs of the same thing."""
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_run(one: Path, other: Path) -> None:
    """Assert that two finished runs are equal bit for bit, time and memory aside: metrics, evaluations, checkpoints, result."""
    assert timeless(lines(one)) == timeless(lines(other))
    files, others = (sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()) for run in (one, other))
    assert files == others
    assert any("optimizer" in name for name in files) and any("value_head" in name for name in files)
    for name in files:
        if name.endswith((".safetensors", "adapter_config.json", "config.yaml")):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
        elif name.endswith("state.json"):
            left, right = (json.loads((run / name).read_text()) for run in (one, other))
            for content in (left, right):
                assert content.pop("seconds")["total"] > 0 and content.pop("sha256")
            assert left == right, name
    evaluations = [json.loads((run / "summary.json").read_text())["eval"] for run in (one, other)]
    assert timeless(list(evaluations[0].values())) == timeless(list(evaluations[1].values()))


def stretches(run: Path) -> list[tuple[int, int]]:
    """Who did which steps, as the manifest says: first and last of each session that did any."""
    sessions = json.loads((run / "manifest.json").read_text())["sessions"]
    return [(s["from_step"], s["to_step"]) for s in sessions if s["from_step"] < s["to_step"]]


# --- In the process that trains ---------------------------------------------------------------------------------------------------

# name -> (module, class or None, function, whether this call is one to die before)
FAILPOINTS: dict[str, tuple[str, str | None, str, Any]] = {
    "before a save": ("upo.training.run", "Run", "save", lambda *a, **k: True),
    "in a save": ("upo.tensors", None, "write", lambda path, *a, **k: Path(path).name == "optimizer.safetensors"),  # the adapter is written
    "after a save": ("upo.training.run", "Run", "prune", lambda *a, **k: True),
    "in the reference pass": ("LEARNER", "", "logps", lambda *a, reference=None, **k: reference is not None),
    "in evaluation": ("LEARNER", "", "score", lambda *a, **k: True),
    "in the result": ("upo.adapters", None, "write_adapter", lambda folder, *a, **k: Path(folder).name == "adapter"),
    "in the metrics": ("upo.training.run", "Run", "append", lambda *a, **k: True),
}


def arm(fail: str, nth: int, backend: str) -> None:
    """Put a fail-point around the product's function."""
    module, owner, name, due = FAILPOINTS[fail]
    if module == "LEARNER":
        module, owner = f"upo_{backend}.step", f"{backend.title()}Learner"
    holder: Any = importlib.import_module(module)
    holder = getattr(holder, owner) if owner else holder
    original, calls = getattr(holder, name), iter(range(1, 1_000_000))

    def dying(*arguments: Any, **options: Any) -> Any:
        if due(*arguments, **options) and next(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(holder, name, dying)


def run(job: dict[str, Any], backend: str, pipe: int) -> None:
    from upo.config import load_config
    from upo.training.loop import train
    from upo.training.reporter import Silent

    infos: list[str] = []
    reporter = Silent()
    reporter.info = reporter.warn = infos.append  # type: ignore[method-assign]
    os.environ["UPO_CACHE"] = job["cache"] or os.environ["UPO_CACHE"]
    if job["fail"]:
        arm(job["fail"], job["nth"], backend)
    error = ""
    try:
        train(load_config(job["config"]), job["out"], resume=job["resume"], reporter=reporter)
    except BaseException:
        error = traceback.format_exc()
    with os.fdopen(pipe, "w") as file:
        json.dump({"error": error, "infos": infos}, file)


def serve(backend: str) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    import conftest  # noqa: F401  (one thread, a fast BLAS, no network)

    preload = {"torch": ["transformers.models.llama.modeling_llama"], "mlx": ["transformers.models.llama.configuration_llama", "mlx_lm.models.llama", "mlx_lm.utils"]}
    for module in (f"upo_{backend}.step", "upo.training.session", "upo.rewards.length", "transformers.models.auto.tokenization_auto", *preload[backend]):
        importlib.import_module(module)
    for line in sys.stdin:
        job, (read, write) = json.loads(line), os.pipe()
        began = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            os.dup2(2, 1)  # stdout is for the answers
            run(job, backend, write)
            os._exit(0)
        os.close(write)
        if job["after"] is not None:
            time.sleep(job["after"])
            os.kill(pid, signal.SIGKILL)  # a process that has ended stays killable until it is waited for
        with os.fdopen(read) as file:
            told = file.read()
        _, status = os.waitpid(pid, 0)
        answer = {"signal": status & 0x7F, "seconds": time.perf_counter() - began, **({"error": "", "infos": []} | (json.loads(told) if told else {}))}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
