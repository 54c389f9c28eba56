"""The value head's start: fitted on the scored training rows before the first step."""

from __future__ import annotations

import numpy as np

from upo.backend import Learner
from upo.data.batch import Batch, Example, collate, micro_batches
from upo.data.forest import Forest
from upo.errors import ModelError
from upo.train.reporter import Reporter


def fit_value(learner: Learner, examples: list[Example], limit: int, reporter: Reporter) -> dict[str, float]:
    """Fit V on every prompt's hidden state and its completions' rewards. Returns what the learner has to say about it.

    Learned online from its initial state V swings and the weights exp(temperature * (R - V)) explode; fitted first it starts where the
    rewards are. Prompts are computed in parts of `limit` tokens over all ranks, and every rank fits the same head.
    """
    batch = collate(examples)
    assert batch.reward is not None
    states = _states(learner, batch, limit, reporter)
    if not np.isfinite(states).all():
        raise ModelError(f"objective.auxiliary: the model's hidden states are not finite ({learner.info.dtype}). Use dtype: float32 or bfloat16.")
    return learner.fit_value(states, batch.forest.owner, batch.reward)


def _states(learner: Learner, batch: Batch, limit: int, reporter: Reporter) -> np.ndarray:
    """[R, H] hidden states at the last prompt token; rank r computes parts r, r + W, ..."""
    comm, count = learner.comm, len(batch.origins)
    bare = collate([Example(o, "group", p, (p[-1:],), (0,)) for o, p in zip(batch.origins, batch.forest.prompts, strict=True)])
    reporter.start("value head", count, "rows")
    found: dict[int, np.ndarray] = {}
    for rows in micro_batches(bare, limit, at_least=comm.size)[comm.rank :: comm.size]:
        prompts = tuple(batch.forest.prompts[r] for r in rows)
        found.update(zip(rows, learner.prompt_states(Forest(prompts, (), np.zeros(0, np.int64))), strict=True))
        reporter.advance(min(len(rows) * comm.size, count))
    width = len(next(iter(found.values()))) if comm.rank == 0 else 0  # a rank may have no rows; rank 0 always has
    width = int(comm.all_sum(np.array([width], np.float32))[0])
    states = np.zeros((count, width), np.float32)
    for row, state in found.items():
        states[row] = state
    return comm.all_sum(states)
