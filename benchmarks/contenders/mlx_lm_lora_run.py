"""mlx-lm-lora's train_dpo. `python mlx_lm_lora_run.py JOB RESULT` in an environment with mlx-lm-lora, which need not have upo."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from stopwatch import Stopwatch, contend, read_rows

if os.environ.get("BENCHMARK_BLAS"):
    ctypes.CDLL(os.environ["BENCHMARK_BLAS"], mode=ctypes.RTLD_GLOBAL)  # before mlx, as upo does: the wheel's own is thirty times slower

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm_lora.trainer import dpo_trainer
from mlx_lm_lora.utils import from_pretrained

if "max_recommended_working_set_size" not in (_info := mx.device_info()):  # mlx-lm-lora asks for it, and there is none off Metal
    mx.device_info = lambda: {**_info, "max_recommended_working_set_size": 0}


class Rows:
    """The dataset as mlx-lm-lora reads it."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        prompt, (chosen, rejected) = self.rows[index]["prompt"], self.rows[index]["completions"]
        return {"chosen": prompt + chosen, "rejected": prompt + rejected, "chosen_prompt_length": len(prompt), "rejected_prompt_length": len(prompt)}


def run(job: dict[str, Any]) -> Stopwatch:
    watch = Stopwatch()
    settings = job["settings"]
    rows = read_rows(job["tokens"])
    model, _, _ = from_pretrained(
        model=job["model"],
        new_adapter_path=job["out"],
        lora_config={"rank": job["rank"], "dropout": 0.0, "scale": job["alpha"] / job["rank"], "use_dora": False, "num_layers": -1},
    )
    reference, _ = load(job["model"])  # a second copy, as mlx-lm-lora's command line loads it
    for loaded in (model, reference):
        loaded.set_dtype(getattr(mx, settings["dtype"]))
    _start_from(model, job)

    class Listener:
        def on_train_loss_report(self, info: dict[str, float]) -> None:
            watch.step()
            watch.losses.append(info["train_loss"])

        def on_val_loss_report(self, info: dict[str, float]) -> None: ...

    _take_in_order(watch, job["batch_size"])
    if settings.get("grad_norms"):
        _record_grad_norms(watch)
    args = dpo_trainer.DPOTrainingArgs(
        batch_size=job["batch_size"],
        iters=job["steps"],
        steps_per_report=1,
        steps_per_save=job["steps"] + 1,
        adapter_file=str(Path(job["out"]) / "adapters.safetensors"),
        max_seq_length=job["max_length"],
        beta=job["beta"],
        grad_checkpoint=settings.get("grad_checkpoint", False),
    )
    dpo_trainer.train_dpo(
        model=model,
        ref_model=reference.freeze(),
        optimizer=optim.AdamW(learning_rate=job["lr"], weight_decay=0.0, bias_correction=True),  # off by default there
        train_dataset=Rows(rows),
        args=args,
        training_callback=Listener(),
    )
    watch.rows([(row["prompt"], *row["completions"]) for row in rows[: job["steps"] * job["batch_size"]]])
    watch.found["setup"] = {"weights": settings["dtype"], "compile": "off" if os.environ.get("MLX_DISABLE_COMPILE") else "on"}
    if mx.default_device().type == mx.gpu:
        watch.found["device_memory_gb"] = mx.get_peak_memory() / 1e9
    else:
        watch.found["gflops_float32"] = _matmul_rate()
    return watch


def _start_from(model: Any, job: dict[str, Any]) -> None:
    """Give it the adapter the others start from; PEFT's matrices are the transposes of mlx-lm's."""
    found = mx.load(str(Path(job["adapter"]) / "adapter_model.safetensors"))
    ours = {}
    for name, array in found.items():
        path, _, side = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        ours[f"{path}.lora_{side.lower()}"] = array.T
    theirs = {name for name, _ in tree_flatten(model.trainable_parameters())}
    if theirs != set(ours):
        raise SystemExit(f"mlx-lm-lora: another adapter than ours: {sorted(theirs ^ set(ours))[:4]}")
    model.load_weights(list(ours.items()), strict=False)


def _take_in_order(watch: Stopwatch, size: int) -> None:
    """Step by step the rows of the file. Left alone it draws every batch anew from the whole data, so that rows come twice or never."""
    original = dpo_trainer.iterate_dpo_batches
    step = 0

    def in_order(dataset: Rows, batch_size: int, max_seq_length: int, train: bool = False) -> Any:
        nonlocal step
        if step == 0:
            watch.training()
        part = Rows(dataset.rows[step * size : (step + 1) * size])
        step += 1
        return original(part, len(part), max_seq_length, train)

    dpo_trainer.iterate_dpo_batches = in_order


def _record_grad_norms(watch: Stopwatch) -> None:
    """It reports none. Only where its step is not compiled."""
    original = dpo_trainer.average_gradients

    def recorded(grads: Any) -> Any:
        watch.grad_norms.append(float(mx.sqrt(sum(mx.sum(mx.square(g)) for _, g in tree_flatten(grads))).item()))
        return original(grads)

    dpo_trainer.average_gradients = recorded


def _matmul_rate(size: int = 512) -> float:
    from time import perf_counter

    a, best = mx.ones((size, size), mx.float32), float("inf")
    for _ in range(3):
        began = perf_counter()
        mx.eval(a @ a)
        best = min(best, perf_counter() - began)
    return 2 * size**3 / best / 1e9


if __name__ == "__main__":
    contend(run)
