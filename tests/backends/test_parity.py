"""The promise of the library: one configuration, the same curve on MLX and on PyTorch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="parity needs both backends: torch is not installed")
pytest.importorskip("mlx.core", reason="parity needs both backends: mlx is not installed")

from upo.backend import get_backend
from upo.config import load_config
from upo.data.batch import Example, collate
from upo.numpy_ops import ops

STEPS, ROWS = 20, 4
OPTIMIZERS = {"adamw": {"name": "adamw", "lr": 1e-3}, "rmsprop": {"name": "rmsprop", "lr": 1e-4}}
OBJECTIVES = {
    "dpo": {"preference": {"loss": "dpo", "beta": 0.1}},
    "kto": {"preference": {"loss": "kto", "beta": 0.1}},
    "upo": {"preset": "upo", "auxiliary": {"rewards": [{"scorer": "column", "column": "goal"}], "actor_warmup_steps": 5}},
}


def make_examples(count: int, vocab: int, seed: int = 0) -> list[Example]:
    """Pairs of random tokens with rewards and, for KTO, the next row's completions as partners."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(5, vocab, rng.integers(low, high)).astype(np.int32)  # noqa: E731
    rows = [
        Example(f"row:{i}", "pair", draw(4, 20), (draw(3, 24), draw(3, 24)), (1, -1), reward=tuple(rng.uniform(0, 1, 2).tolist()))
        for i in range(count)
    ]
    return [replace(row, partners=rows[(i + 1) % count].completions) for i, row in enumerate(rows)]


def configure(model: Path, backend: str, objective: dict, optimizer: dict):
    return load_config(
        {
            "model": str(model),
            "backend": backend,
            "device": "cpu",
            "dtype": "float32",
            "data": {"train": "-"},
            "adapter": {"rank": 8, "alpha": 16},
            "objective": objective,
            "optimizer": {**optimizer, "schedule": "constant", "warmup_steps": 0},
        }
    )


def run(model: Path, backend: str, objective: dict, optimizer: dict, lr: float | None = None):
    """(loss of each step, adapter at the end) of STEPS steps."""
    config = configure(model, backend, objective, optimizer)
    built = config.objective.build()
    learner = get_backend(backend).load(config)
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    rows = make_examples(12, vocab)
    whole = collate(rows)
    reference = learner.logps(whole.forest, reference=0)
    partner = learner.logps(whole.partners, reference=0)
    rows = [
        replace(r, ref_logp=tuple(reference[2 * i : 2 * i + 2].tolist()), partner_ref_logp=tuple(partner[2 * i : 2 * i + 2].tolist()))
        for i, r in enumerate(rows)
    ]
    if built.auxiliary:
        learner.fit_value(learner.prompt_states(whole.forest), whole.forest.owner, whole.reward)
    losses = []
    for step in range(STEPS):
        batch = collate([rows[(step * ROWS + i) % len(rows)] for i in range(ROWS)], step)
        outcome = learner.step(batch, config.optimizer.lr if lr is None else lr)
        scores = batch.scores(outcome.logp, outcome.value, outcome.partner_logp - batch.partner_ref_logp)
        losses.append(float(built(ops, scores)["loss"]))
    return np.array(losses), learner.state()["adapter"]


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.max(np.abs(a - b) / np.abs(b)))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_same_curve(tiny_llama, objective, optimizer):
    """20 steps: losses within 2e-5 relative (float32 sums in another order), adapters within 1e-4 of their largest entry."""
    curves, adapters = zip(*(run(tiny_llama, b, OBJECTIVES[objective], OPTIMIZERS[optimizer]) for b in ("torch", "mlx")), strict=True)
    assert relative(curves[1], curves[0]) < 2e-5
    assert sorted(adapters[0]) == sorted(adapters[1])
    for name, value in adapters[0].items():
        assert np.max(np.abs(adapters[1][name] - value)) < 1e-4, name


def test_the_curve_depends_on_updates_and_actor(tiny_llama):
    """What keeps the parity test honest: without updates, or without UPO's actor, the curve is another one."""
    learning, _ = run(tiny_llama, "torch", OBJECTIVES["upo"], OPTIMIZERS["adamw"])
    frozen, _ = run(tiny_llama, "torch", OBJECTIVES["upo"], OPTIMIZERS["adamw"], lr=0.0)
    assert relative(learning, frozen) > 1e-2
    off = {**OBJECTIVES["upo"], "auxiliary": {**OBJECTIVES["upo"]["auxiliary"], "actor_warmup_steps": 1000}}
    without_actor, _ = run(tiny_llama, "torch", off, OPTIMIZERS["adamw"])
    assert relative(learning, without_actor) > 1e-2


@pytest.mark.slow
def test_real_model_logps(smollm2, harmless_pairs):
    """SmolLM2-135M on 16 real pairs: 3e-5 nats per token and 5e-3 per completion between the backends."""
    from upo.data.load import load_data
    from upo.data.tokenizer import load_tokenizer
    from upo.training.reporter import Silent

    found = {}
    for backend in ("torch", "mlx"):
        config = configure(smollm2, backend, OBJECTIVES["dpo"], OPTIMIZERS["adamw"])
        config = config.model_copy(update={"data": config.data.model_copy(update={"train": str(harmless_pairs)})})
        rows = load_data(config, load_tokenizer(smollm2), Silent()).train
        short = sorted(rows, key=lambda r: r.tokens)[:64][::4]
        learner = get_backend(backend).load(config)
        found[backend] = learner.logps(collate(short).forest)
    lengths = collate(short).forest.lengths
    difference = np.abs(found["torch"] - found["mlx"])
    assert len(difference) == 32
    assert difference.max() <= 5e-3
    assert (difference / lengths).max() <= 3e-5
