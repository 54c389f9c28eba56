"""What the step tests of both backends share: a configuration, rows of random tokens, and how far gradients are apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from upo.config import RunConfig, load_config
from upo.data.batch import Batch, Example, collate, micro_batches

VOCAB = 384
UPO = {"preset": "upo", "auxiliary": {"rewards": [{"scorer": "length"}]}}


def configure(folder: Path, objective: object = "dpo", **sections: Any) -> RunConfig:
    """A small run without a largest gradient norm, so that gradients are seen as they are."""
    return load_config(
        {
            "model": str(folder),
            "data": {"train": "none.jsonl"},
            "adapter": {"rank": 4, "alpha": 8, **sections.pop("adapter", {})},
            "objective": objective if isinstance(objective, dict) else {"preference": {"loss": objective}},
            "optimizer": {"clip": 1e9, **sections.pop("optimizer", {})},
            **sections,
        }
    )


def examples(n: int = 8, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> np.ndarray:
        return rng.integers(3, VOCAB, rng.integers(low, high)).astype(np.int32)

    rows = []
    for i in range(n):
        pair, partners = (tokens(2, 12), tokens(2, 12)), (tokens(2, 12), tokens(2, 12))
        reward = tuple(float(r) for r in rng.random(2))
        rows.append(Example(f"t:{i + 1}", "pair", tokens(3, 10), pair, (1, -1), reward=reward, partners=partners))
    return rows


def with_reference(learner, rows: list[Example]) -> Batch:
    batch = collate(rows)
    partners = batch.partners
    return replace(batch, ref_logp=learner.logps(batch.forest, reference=0), partner_ref_logp=learner.logps(partners, reference=0))


def shake(learner, seed: int = 5) -> None:
    """Leave the point where the policy equals its reference."""
    rng = np.random.default_rng(seed)
    state = learner.state()
    state["adapter"] = {k: (a + 0.1 * rng.standard_normal(a.shape)).astype(np.float32) for k, a in state["adapter"].items()}
    if "value_head" in state:
        state["value_head"] = {k: (a + 0.1 * rng.standard_normal(a.shape)).astype(np.float32) for k, a in state["value_head"].items()}
    learner.load_state(state)


def limit_for(batch: Batch, parts: int, layout: str) -> int:
    """A token limit that cuts the batch into so many micro-batches of this layout."""
    return next(n for n in range(8, 4000, 2) if len(micro_batches(batch, n, layout=layout, device="cpu")) == parts)


def difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Largest deviation relative to the largest entry of any array."""
    assert a.keys() == b.keys() and a
    return max(np.abs(a[k] - b[k]).max() for k in a) / max(np.abs(x).max() for x in a.values())
