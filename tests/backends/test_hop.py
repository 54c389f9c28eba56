"""A run that changes its backend half-way stays on the curve: MLX, then PyTorch, then MLX again, in the middle of an epoch each time."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killable import lines

pytest.importorskip("torch", reason="the hop needs both backends: torch is not installed")
pytest.importorskip("mlx.core", reason="the hop needs both backends: mlx is not installed")

from upo.config import load_config
from upo.training.loop import train
from upo.training.reporter import Silent

STEPS, ROWS, BATCH = 30, 14, 4  # 4 steps an epoch, so that steps 10 and 19 are within one
OPTIMIZERS = {"adamw": {"name": "adamw", "lr": 2e-3}, "rmsprop": {"name": "rmsprop", "lr": 3e-4}}
CURVE = 1e-5  # relative; 4e-7 was measured: float32 sums in another order


class Stopper(Silent):
    """Asks the run to stop, as Ctrl-C does, when a step is done; keeps what is said."""

    def __init__(self, stop: int | None) -> None:
        self.stop, self.infos = stop, []

    def info(self, text: str) -> None:
        self.infos.append(text)

    def metrics(self, record: Mapping[str, Any]) -> None:
        if record["step"] == self.stop and "eval" not in record:
            signal.raise_signal(signal.SIGINT)


def rows(count: int, first: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"What is {i} and {i}?", "chosen": "The answer is " + "that " * (i % 5 + 1), "rejected": f"I do not know {i}."} for i in range(first, first + count)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hop")
    for name, content in (("train", rows(ROWS)), ("held_out", rows(4, 50))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def go(place: Path, model: Path, out: Path, backend: str, optimizer: str, *, to: int | None = None, **train_keys: Any) -> list[str]:
    """Train with a backend, on from where `out` is, up to a step (or to the end). Returns what was said."""
    config = load_config(
        {
            "model": str(model),
            "backend": backend,
            "device": "cpu",
            "dtype": "float32",
            "data": {"train": str(place / "train.jsonl"), "eval": str(place / "held_out.jsonl")},
            "adapter": {"rank": 8, "alpha": 16},
            "objective": {"preset": "upo", "auxiliary": {"rewards": [{"scorer": "length", "low": 3, "high": 9}]}},
            "optimizer": {**OPTIMIZERS[optimizer], "schedule": "cosine", "warmup_steps": 3},
            "train": {"steps": STEPS, "batch_size": BATCH, "save_every": 0, "eval_every": 10, **train_keys},
        }
    )
    listener = Stopper(to)
    if to is None:
        train(config, out, resume=out.exists(), reporter=listener)
    else:
        with pytest.raises(KeyboardInterrupt):
            train(config, out, resume=out.exists(), reporter=listener)
    return listener.infos


def curve(out: Path, name: str = "loss", evaluation: bool = False) -> np.ndarray:
    return np.array([line[name] for line in lines(out) if line.get("eval", False) == evaluation])


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.max(np.abs(a - b) / np.abs(b)))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_there_and_back(optimizer, place, tiny_llama, tmp_path):
    go(place, tiny_llama, tmp_path / "mlx", "mlx", optimizer)
    hop = tmp_path / "hop"
    go(place, tiny_llama, hop, "mlx", optimizer, to=10)
    # Smaller micro-batches, as another device would want them.
    told = go(place, tiny_llama, hop, "torch", optimizer, to=19, micro_batch_tokens=200)
    back = go(place, tiny_llama, hop, "mlx", optimizer)

    whole, hopped = curve(tmp_path / "mlx"), curve(hop)
    assert len(whole) == len(hopped) == STEPS and (whole[:10] == hopped[:10]).all()
    print(optimizer, "loss", relative(hopped, whole), "evaluation", relative(curve(hop, evaluation=True), curve(tmp_path / "mlx", evaluation=True)))
    assert relative(hopped, whole) < CURVE
    assert relative(curve(hop, evaluation=True), curve(tmp_path / "mlx", evaluation=True)) < CURVE
    assert (curve(hop, "lr") == curve(tmp_path / "mlx", "lr")).all() and (curve(hop, "epoch") == curve(tmp_path / "mlx", "epoch")).all()
    assert whole[-1] < 0.9 * whole[0], "a run that learns nothing would stay on any curve"

    sessions = json.loads((hop / "manifest.json").read_text())["sessions"]
    assert [(s["backend"], s["device"], s["from_step"], s["to_step"]) for s in sessions] == [("mlx", "cpu", 0, 10), ("torch", "cpu", 10, 19), ("mlx", "cpu", 19, 30)]
    assert "torch" in sessions[1]["versions"] and "mlx" in sessions[2]["versions"]
    assert "Going on after step 10 of 30 (1-10 by mlx on cpu)." in told
    assert "Going on after step 19 of 30 (1-10 by mlx on cpu, 11-19 by torch on cpu)." in back
    for split in ("train", "eval"):
        (said,) = (text for text in told if text.startswith(f"Reference ({split}): computed anew, as backend, device or dtype changed"))
        assert 0 < float(re.search(r"earlier ones (\S+) nats", said)[1]) < 1e-3


def test_without_its_optimizer_a_run_leaves_the_curve(place, tiny_llama, tmp_path, monkeypatch):
    """What keeps the test above honest: moments that are lost on the way show."""
    go(place, tiny_llama, tmp_path / "whole", "torch", "adamw")
    go(place, tiny_llama, tmp_path / "lost", "torch", "adamw", to=10)
    import upo_torch.state

    load = upo_torch.state.Optimizer.load_state
    monkeypatch.setattr(upo_torch.state.Optimizer, "load_state", lambda self, state, prefix="": load(self, {n: 0 * a for n, a in state.items()}, prefix))
    go(place, tiny_llama, tmp_path / "lost", "torch", "adamw")
    assert relative(curve(tmp_path / "lost"), curve(tmp_path / "whole")) > 100 * CURVE
