"""Figures of the work done: counted against the layouts themselves, and the arithmetic against a count by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fake_learner import pairs

from upo.backend import ModelInfo
from upo.data.batch import collate
from upo.data.forest import Forest, padded
from upo.data.packed import packed
from upo.data.partners import assign_partners
from upo.data.two_phase import two_phase
from upo.flops import Sizes, Work, backward_flops, forward_flops, peak_flops, sizes_of
from upo.learner import partners_of, parts_of
from upo.training.work import averages, batch_work, evaluation_work, figures, forest_work

LAYOUTS = ("padded", "packed", "two_phase")


def forest(seed: int) -> Forest:
    """Tokens from 1, so that 0 is padding."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(1, 99, rng.integers(low, high)).astype(np.int32)  # noqa: E731
    prompts = tuple(draw(1, 9) for _ in range(rng.integers(1, 5)))
    owner = rng.integers(0, len(prompts), rng.integers(1, 8))
    return Forest(prompts, tuple(draw(1, 7) for _ in owner), owner)


@pytest.mark.parametrize("seed", range(8))
def test_counts_are_those_of_the_layouts(seed):
    """Slots and tokens from the arrays themselves; pairs from who sees whom."""
    texts = forest(seed)
    rows, row, phases = padded(texts), packed(texts), two_phase(texts)
    per_row = (rows.ids > 0).sum(1)
    seen = [(t.branches()[None] == 0) | (t.branches()[None] == t.branches()[:, None]) for t in row.trees]
    seen = [s & (t.positions()[None] <= t.positions()[:, None]) for s, t in zip(seen, row.trees, strict=True)]
    prompts, answers = ((a > 0).sum(1) for a in (phases.ids, phases.rows))
    expected = {
        "padded": (rows.ids.size, per_row.sum(), 0, sum(n * (n + 1) / 2 for n in per_row)),
        "packed": (row.ids.size, row.ids.size, per_row.sum() - row.ids.size, sum(s.sum() for s in seen)),
        "two_phase": (
            phases.ids.size + phases.rows.size,
            prompts.sum() + answers.sum(),
            per_row.sum() - row.ids.size,
            sum(n * (n + 1) / 2 for n in prompts) + sum(sum(o + i + 1 for i in range(n)) for o, n in zip(phases.offset, answers, strict=True)),
        ),
    }
    for layout, counts in expected.items():
        assert forest_work(texts, layout).counts() == (*counts, texts.lengths.sum()), layout


class Rank:
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 3, 20])
def test_a_step_is_the_sum_of_what_its_ranks_compute(layout, ranks):
    batch, info = collate(assign_partners(pairs(9), 0, 64)), ModelInfo("m", "float32", "cpu", 1, 1, (), "w", layout=layout, micro_batch_tokens=40)
    parts = lambda whole: [p.batch for r in range(ranks) for p in parts_of(whole, Rank(r, ranks), info)]  # noqa: E731
    add = lambda found: sum((forest_work(part.scored, layout) for part in found), Work())  # noqa: E731
    assert batch_work(batch, ranks, info) == (add(parts(batch)), add(parts(partners_of(batch))))
    own, partners = batch_work(replace(batch, partners=None), ranks, info)
    assert partners == Work() and own.scored == batch.count["token"]
    assert evaluation_work(batch, ranks, info)[0].scored == own.scored
    wide = replace(info, micro_batch_tokens=10**6)
    assert evaluation_work(batch, ranks, wide) == batch_work(batch, ranks, wide)


SIZES = Sizes(linear=10, adapter=3, attention=4, head=5)
WORK = Work(slots=9, tokens=7, saved=3, pairs=11, scored=2)


def test_the_arithmetic_by_hand():
    assert forward_flops(SIZES, WORK) == 2 * 13 * 7 + 4 * 4 * 11 + 2 * 5 * 2 == 378
    assert backward_flops(SIZES, WORK) == (2 * 10 + 4 * 3) * 7 + 2 * (4 * 4 * 11) + 2 * 5 * 2 == 596


def test_figures():
    info = ModelInfo("m", "bfloat16", "cuda:0", 1, 1, (), "w", chip="NVIDIA L4", sizes=SIZES)
    partners = Work(slots=11, tokens=9, saved=1, pairs=2, scored=4)
    found = figures((WORK, partners), info, 2.0, 4, trained=True)
    needed = 378 + 596 + (2 * 13 * 9 + 4 * 4 * 2 + 2 * 5 * 4)
    assert found == {"slots": 20, "padding": pytest.approx(4 / 20), "shared_tokens": pytest.approx(4 / 20), "mfu": pytest.approx(needed / (2 * 4 * 121e12))}
    assert figures((WORK, Work()), info, 2.0, 1, trained=False)["mfu"] == pytest.approx(378 / (2 * 121e12))
    for unknown in (replace(info, chip=""), replace(info, sizes=None), replace(info, chip="NVIDIA Next")):
        assert sorted(figures((WORK, partners), unknown, 2.0, 4, trained=True)) == ["padding", "shared_tokens", "slots"]


def test_averages_of_a_run():
    """Shares of all slots and texts, rates over all seconds; evaluations and lines without figures left out."""
    lines = [
        {"step": 1, "slots": 100, "padding": 0.5, "shared_tokens": 0.0, "tokens_per_s": 10.0, "seconds": 1.0, "mfu": 0.2},
        {"step": 1, "eval": True, "slots": 999, "padding": 0.9, "shared_tokens": 0.9, "tokens_per_s": 1e9, "seconds": 1e3, "mfu": 1.0},
        {"step": 2, "slots": 300, "padding": 0.1, "shared_tokens": 0.4, "tokens_per_s": 20.0, "seconds": 3.0},
        {"step": 3, "tokens_per_s": 1e9, "seconds": 1.0},
    ]
    found = averages(lines)  # 50 + 270 tokens held; 50 + 450 with a prompt for each
    assert found == pytest.approx({"slots": 400, "padding": 80 / 400, "shared_tokens": 180 / 500, "tokens_per_s": 70 / 4, "mfu": 0.2})
    assert averages([]) == {"slots": 0}


@pytest.mark.parametrize(
    ("chip", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989), ("NVIDIA H100 PCIe", "bfloat16", 756), ("NVIDIA H100 NVL", "float32", 60), ("NVIDIA H200", "float16", 989),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312), ("NVIDIA A100 80GB PCIe", "float32", 19.5), ("NVIDIA L4", "bfloat16", 121), ("NVIDIA L40S", "bfloat16", 362),
        ("NVIDIA A10", "bfloat16", 125), ("NVIDIA A10G", "bfloat16", None), ("Tesla T4", "bfloat16", None), ("Tesla T4", "float16", 65),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2), ("NVIDIA GeForce RTX 4090 D", "bfloat16", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("NVIDIA RTX 6000 Ada Generation", "bfloat16", 364.2), ("Quadro RTX 6000", "bfloat16", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("Apple M1 Max", "float16", 10.4), ("Apple M1", "float32", 2.6), ("Apple M4 Max", "float16", None), ("", "float32", None), ("x86_64", "float32", None),
    ],
)  # fmt: skip
def test_peaks(chip, dtype, tflops):
    assert peak_flops(chip, dtype) == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_sizes_of_a_model():
    config = {"hidden_size": 8, "vocab_size": 50, "num_attention_heads": 2, "num_hidden_layers": 3, "head_dim": 5, "sliding_window": None}
    dims = {f"model.layers.{i}.{name}": (8, 40) for i in range(3) for name in ("q", "k")}
    linear = 6 * 320
    norms = 12
    whole = linear + 8 * 50 + norms
    assert sizes_of(config, dims, whole, 7, 64) == Sizes(linear, 7, 3 * 2 * 5, 400)
    assert sizes_of({"text_config": config}, dims, whole + 400, 7, 64) == Sizes(linear, 7, 30, 400)  # a head of its own
    assert sizes_of({**config, "head_dim": None}, dims, whole, 7, 64) == Sizes(linear, 7, 24, 400)
    assert sizes_of({**config, "sliding_window": 64}, dims, whole, 7, 64) is not None
    for change in ({"sliding_window": 63}, {"kv_lora_rank": 4}, {"hidden_size": None}):
        assert sizes_of({**config, **change}, dims, whole, 7, 64) is None
    assert sizes_of(config, dims, whole + 100, 7, 64) is None, "something else is a good part of the model"
    assert sizes_of(config, {**dims, "model.layers.0.experts.0.up": (1, 1)}, whole, 7, 64) is None
