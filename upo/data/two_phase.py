"""The two-phase layout: prompts as one batch of token rows, completions as another that reads the prompts' keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from upo.data.forest import Forest, Layout


@dataclass(frozen=True)
class TwoPhase(Layout):
    """`ids` [R, L] are the prompts. Row i of `rows` [N, T] is completion i without its last token, which nothing is predicted from.

    Both are padded on the right, so that every token keeps the position it has in a row of its own: the first token of row i stands at
    position `offset[i]`, the length of its prompt. The slots that `src`, `value_src` and `keys` point into are those of the prompts,
    flattened, and then those of the rows, R * L + N * T in all.

    `keys[i]` are the slots of prompt and completion without a gap: what row i attends to, at the places they have in a row of their own.
    So the sums of attention run in the order of the padded layout, whatever else is in the batch.
    """

    rows: np.ndarray  # [N, T] int32; T is 0 where every completion has one token
    offset: np.ndarray  # [N] int32
    keys: np.ndarray  # [N, W] int32, filled up with slot 0


def two_phase(forest: Forest, pad_id: int = 0) -> TwoPhase:
    """Each prompt once, and each completion once. The last prompt token predicts the first token of all of its completions."""
    prompts = _padded(forest.prompts, pad_id)
    rows = _padded([c[:-1] for c in forest.completions], pad_id)
    lengths = np.array([len(p) for p in forest.prompts], np.int64)
    value_src = np.arange(len(lengths)) * prompts.shape[1] + lengths - 1
    owner = forest.owner.astype(np.int64)
    keys = np.zeros((len(rows), max((lengths[o] + len(c) - 1 for o, c in zip(owner, forest.completions, strict=True)), default=0)), np.int32)
    src, tgt, own = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for i, completion in enumerate(forest.completions):
        ahead = owner[i] * prompts.shape[1] + np.arange(lengths[owner[i]])
        within = prompts.size + i * rows.shape[1] + np.arange(len(completion) - 1)
        keys[i, : len(ahead) + len(within)] = np.concatenate([ahead, within])
        src += [ahead[-1:], within]
        tgt.append(completion)
        own.append(np.full(len(completion), i))
    src_, tgt_, own_ = (np.concatenate(a).astype(np.int64) for a in (src, tgt, own))
    return TwoPhase(prompts, src_, tgt_, own_, value_src, rows, lengths[owner].astype(np.int32), keys)


def _padded(sequences: tuple[np.ndarray, ...] | list[np.ndarray], pad_id: int) -> np.ndarray:
    """[n, longest] int32, padded on the right."""
    ids = np.full((len(sequences), max(map(len, sequences), default=0)), pad_id, np.int32)
    for row, tokens in zip(ids, sequences, strict=True):
        row[: len(tokens)] = tokens
    return ids
