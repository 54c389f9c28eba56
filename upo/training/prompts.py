"""Hidden states of the prompts: what the value head reads, and what tells how alike two prompts are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from upo.backend import Learner
from upo.data.batch import Example, collate, micro_batches
from upo.data.forest import Forest
from upo.errors import ModelError
from upo.training.reporter import Reporter


def prompt_states(learner: Learner, examples: Sequence[Example], phase: str, reporter: Reporter, reference: int | None = None) -> np.ndarray:
    """[R, H] hidden states after the final norm at each row's last prompt token, under the policy or a reference.

    Rank r computes micro-batches r, r + W, ..., and every rank gets all. Raises ModelError if they are not finite.
    """
    comm = learner.comm
    bare = collate([Example(e.origin, "group", e.prompt, (e.prompt[-1:],), (0,)) for e in examples])
    reporter.start(phase, len(examples), "rows")
    found: dict[int, np.ndarray] = {}
    for rows in micro_batches(bare, learner.info.micro_batch_tokens, at_least=comm.size)[comm.rank :: comm.size]:
        prompts = tuple(examples[r].prompt for r in rows)
        found.update(zip(rows, learner.prompt_states(Forest(prompts, (), np.zeros(0, np.int64)), reference=reference), strict=True))
        reporter.advance(min(len(rows) * comm.size, len(examples)))
    width = len(next(iter(found.values()))) if comm.rank == 0 else 0  # a rank may have no rows; rank 0 always has
    width = int(comm.all_sum(np.array([width], np.float32))[0])
    states = np.zeros((len(examples), width), np.float32)
    for row, state in found.items():
        states[row] = state
    states = comm.all_sum(states)
    if not np.isfinite(states).all():
        raise ModelError(f"{phase}: the model's hidden states are not finite ({learner.info.dtype}). Use dtype: float32 or bfloat16.")
    return states


def with_embeddings(learner: Learner, train: Sequence[Example], held_out: Sequence[Example], reporter: Reporter) -> tuple[list[Example], list[Example]]:
    """Both splits with `embedding`: the reference's hidden state of the prompt, less the mean over the training rows, of unit length.

    Without the subtraction all prompts are alike: they end in the same tokens of the chat template, and hidden states share a large
    common direction.
    """
    splits = [list(train), list(held_out)]
    states = [prompt_states(learner, rows, "prompt embeddings", reporter, reference=0) if rows else None for rows in splits]
    assert states[0] is not None
    centre = states[0].mean(axis=0)
    for rows, found in zip(splits, states, strict=True):
        if found is not None:
            moved = found - centre
            unit = moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)
            rows[:] = [replace(e, embedding=v) for e, v in zip(rows, unit, strict=True)]
    return splits[0], splits[1]
