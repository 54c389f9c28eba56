"""upo, through its public Python interface. `python upo_run.py JOB RESULT` in this project's environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stopwatch import Stopwatch, contend

from upo import load_config
from upo.training.loop import train
from upo.training.prepare import prepare
from upo.training.reporter import Silent


class Listener(Silent):
    """Takes the times of a run from what it reports."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def start(self, phase: str, total: int, unit: str) -> None:
        if phase.startswith("reference"):
            self.watch.begins()
        if phase == "train":
            self.watch.training()

    def info(self, text: str) -> None:
        if "prompt of its own" in text or "from the cache" in text:
            self.watch.notes.append(text)

    def metrics(self, record: Mapping[str, Any]) -> None:
        if not record.get("eval"):
            self.watch.took(record["seconds"])
            self.watch.losses.append(record["loss"])
            self.watch.grad_norms.append(record["grad_norm"])


def run(job: dict[str, Any]) -> Stopwatch:
    watch = Stopwatch()
    config = load_config(configuration(job), job["settings"].get("set", ()))
    if job["settings"].get("plain_logits"):
        use_plain_logits(config.backend)
    summary = train(config, job["out"], reporter=Listener(watch))
    watch.reference_s = summary["reference_s"]
    if on_gpu(config.backend):
        watch.found["device_memory_gb"] = summary["peak_memory_gb"]
    elif config.backend == "mlx":
        from upo_mlx.device import matmul_rate

        watch.found["gflops_float32"] = matmul_rate()
    rows = prepare(config, allow_code=False, reporter=Silent())
    watch.rows([(e.prompt, *e.completions) for step in range(rows.total) for e in rows.rows_of(step)])
    return watch


def configuration(job: dict[str, Any]) -> dict[str, Any]:
    """The work all contenders do, as a run of ours; what is not named here is our default."""
    return {
        "model": job["model"],
        "data": {"train": job["rows"]},
        "adapter": {"rank": job["rank"], "alpha": job["alpha"]},
        "objective": {"preference": {"loss": "dpo", "beta": job["beta"]}},
        "optimizer": {"lr": job["lr"], "schedule": "constant", "warmup_steps": 0, "clip": job["clip"]},
        "train": {"steps": job["steps"], "batch_size": job["batch_size"], "max_length": job["max_length"], "seed": job["seed"]},
    }


def on_gpu(backend: str) -> bool:
    """Whether memory is that of a GPU's allocator, and not of the process."""
    if backend == "mlx":
        from upo_mlx.device import has_gpu

        return has_gpu()
    import torch

    return torch.cuda.is_available()


def use_plain_logits(backend: str) -> None:
    """Compute log-probs by the textbook: all logits of a micro-batch at once, differentiated by the framework."""
    if backend == "torch":
        import torch

        import upo_torch.step

        def plain(head: Any, width: int, hidden: Any, targets: Any) -> Any:
            return torch.log_softmax(head(hidden), -1).gather(-1, targets[:, None])[:, 0]

        upo_torch.step.token_logps = plain
    else:
        import upo_mlx.step
        from upo_mlx.device import mx

        def plain_mlx(head: Any, hidden: Any, targets: Any) -> Any:
            logits = head(hidden)
            return (mx.take_along_axis(logits, targets[:, None], -1) - mx.logsumexp(logits, -1, keepdims=True))[:, 0]

        upo_mlx.step.token_logps = upo_mlx.step.token_logps_only = plain_mlx


if __name__ == "__main__":
    contend(run)
