"""The two-phase layout: prompts as one batch of token rows, completions as another that reads the prompts' keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from upo.data.forest import Forest, Layout


@dataclass(frozen=True)
class TwoPhase(Layout):
    """`ids` [R, L] are the prompts. Row i of `rows` [N, T] is completion i without its last token, which nothing is predicted from.

    Both are padded on the right, so that every token keeps the position it has in a row of its own: the first token of row i stands at
    position `offset[i]`, the length of its prompt `owner[i]`. The hidden states that `src` and `value_src` point into are those of the
    prompts, flattened, and then those of the rows, R * L + N * T in all.
    """

    rows: np.ndarray  # [N, T] int32; T is 0 where every completion has one token
    owner: np.ndarray  # [N] int32, index into the prompts
    offset: np.ndarray  # [N] int32


def two_phase(forest: Forest, pad_id: int = 0) -> TwoPhase:
    """Each prompt once, and each completion once. The last prompt token predicts the first token of all of its completions."""
    prompts = _padded(forest.prompts, pad_id)
    rows = _padded([c[:-1] for c in forest.completions], pad_id)
    lengths = np.array([len(p) for p in forest.prompts], np.int64)
    value_src = np.arange(len(lengths)) * prompts.shape[1] + lengths - 1
    owner = forest.owner.astype(np.int64)
    src, tgt, own = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for i, completion in enumerate(forest.completions):
        start = prompts.size + i * rows.shape[1]
        src += [value_src[owner[i] : owner[i] + 1], start + np.arange(len(completion) - 1)]
        tgt.append(completion)
        own.append(np.full(len(completion), i))
    src_, tgt_, own_ = (np.concatenate(a).astype(np.int64) for a in (src, tgt, own))
    return TwoPhase(prompts, src_, tgt_, own_, value_src, rows, owner.astype(np.int32), lengths[owner].astype(np.int32))


def _padded(sequences: tuple[np.ndarray, ...] | list[np.ndarray], pad_id: int) -> np.ndarray:
    """[n, longest] int32, padded on the right."""
    ids = np.full((len(sequences), max(map(len, sequences), default=0)), pad_id, np.int32)
    for row, tokens in zip(ids, sequences, strict=True):
        row[: len(tokens)] = tokens
    return ids
