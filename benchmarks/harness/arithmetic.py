"""How much arithmetic a step needs, and how much of it is attention, whose share grows with the length."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
from harness.work import Work

from upo.data.forest import Forest
from upo.flops import Sizes, backward_flops, forward_flops, sizes_of
from upo.memory import model_shapes
from upo.models import model_config
from upo.training.work import forest_work


def model_sizes(work: Work) -> Sizes:
    """What a token meets in the model. Raises ValueError for one whose arithmetic cannot be told from its layers."""
    model = Path(work.model)
    shapes = model_shapes(model)
    adapter = sum(work.rank * (i + o) for i, o in shapes.linears.values())
    sizes = sizes_of(model_config(model)[0], shapes.linears, shapes.parameters, adapter, work.max_length)
    if sizes is None:
        raise ValueError(f"{model}: no plain decoder, so its arithmetic is not known")
    return sizes


@cache
def step_flops(work: Work) -> tuple[float, float]:
    """(Floating-point operations of a step and its share of the reference pass, attention's part of them from 0 to 1), every prompt computed once."""
    records = [json.loads(line) for line in Path(work.tokens).read_text(encoding="utf-8").splitlines()][: work.batch_size]
    owner = np.repeat(np.arange(len(records)), [len(record["completions"]) for record in records])
    texts = Forest(tuple(np.array(r["prompt"]) for r in records), tuple(np.array(c) for r in records for c in r["completions"]), owner)
    sizes, counts = model_sizes(work), forest_work(texts, "packed")
    total = 2 * forward_flops(sizes, counts) + backward_flops(sizes, counts)
    return float(total), 16 * sizes.attention * counts.pairs / total  # 4 in either forward pass, 8 in the backward one
