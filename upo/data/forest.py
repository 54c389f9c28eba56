"""The logical shape of what a model scores: prompts, each once, with the completions that grow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Tokens = np.ndarray  # [length] int32 token ids


@dataclass(frozen=True)
class Forest:
    """R prompts and N completions; completion i belongs to prompt `owner[i]`. Nothing here is padded, shifted or masked."""

    prompts: tuple[Tokens, ...]
    completions: tuple[Tokens, ...]
    owner: np.ndarray  # [N] integer index into prompts

    def __post_init__(self) -> None:
        if len(self.owner) != len(self.completions):
            raise ValueError(f"{len(self.completions)} completions with {len(self.owner)} owners")
        if any(len(t) == 0 for t in (*self.prompts, *self.completions)):
            raise ValueError("a prompt or completion without tokens cannot be scored")

    @property
    def lengths(self) -> np.ndarray:
        """[N] scored tokens of each completion."""
        return np.array([len(c) for c in self.completions], np.int64)

    def join(self, other: Forest) -> Forest:
        """This forest with the completions of another one on the same prompts after its own."""
        return Forest(self.prompts, self.completions + other.completions, np.concatenate([self.owner, other.owner]))

    def select(self, prompts: Sequence[int]) -> tuple[Forest, np.ndarray]:
        """The sub-forest of the given prompts, in their order, and the indices [n] of its completions in this forest."""
        where = np.full(len(self.prompts), -1)
        where[list(prompts)] = np.arange(len(prompts))
        owner = where[self.owner.astype(np.int64)]
        kept = np.flatnonzero(owner >= 0)
        owner = owner[kept]
        return Forest(tuple(self.prompts[p] for p in prompts), tuple(self.completions[i] for i in kept), owner), kept


@dataclass(frozen=True)
class Layout:
    """A forest laid out as a batch of token rows [B, T], with the places of its scores in the flattened hidden states [B * T].

    Shift and mask are decided here and nowhere else: the hidden state at `src[m]` predicts token `tgt[m]` of completion `own[m]`; the
    last prompt token predicts a completion's first token. `value_src[r]` is the last token of prompt r. Rows are padded on the right,
    so a causal model needs no attention mask.
    """

    ids: np.ndarray  # [B, T] int32
    src: np.ndarray  # [M] int64, sorted by completion, then by position
    tgt: np.ndarray  # [M] int64
    own: np.ndarray  # [M] int64, index into the forest's completions
    value_src: np.ndarray  # [R] int64


def padded(forest: Forest, multiple: int = 1, pad_id: int = 0) -> Layout:
    """One row per completion, prompt + completion, padded on the right; a prompt without completions gets a row of its own.

    `multiple` rounds the row length up, so that few shapes occur (compiled graphs) or a kernel applies.
    """
    rows = [(int(p), c) for p, c in zip(forest.owner, forest.completions, strict=True)]
    rows += [(p, np.zeros(0, np.int32)) for p in sorted(set(range(len(forest.prompts))) - {p for p, _ in rows})]
    longest = max(len(forest.prompts[p]) + len(c) for p, c in rows)
    width = -(-longest // multiple) * multiple
    ids = np.full((len(rows), width), pad_id, np.int32)
    src, tgt, own, value_src = [], [], [], np.zeros(len(forest.prompts), np.int64)
    for b, (p, completion) in enumerate(rows):
        prompt = forest.prompts[p]
        n, m = len(prompt), len(completion)
        ids[b, :n], ids[b, n : n + m] = prompt, completion
        first = b * width + n - 1  # the last prompt token
        value_src[p] = first
        src.append(first + np.arange(m))
        tgt.append(completion)
        own.append(np.full(m, b))
    src_, tgt_, own_ = (np.concatenate(a).astype(np.int64) for a in (src, tgt, own))
    return Layout(ids, src_, tgt_, own_, value_src)


def padded_size(lengths: Sequence[tuple[int, Sequence[int]]], multiple: int = 1) -> int:
    """Token slots `padded` takes for rows given as (prompt length, completion lengths), without building them."""
    rows = [p + c for p, cs in lengths for c in (cs or (0,))]
    return len(rows) * (-(-max(rows) // multiple) * multiple)


def packed_size(lengths: Sequence[tuple[int, Sequence[int]]]) -> int:
    """Token slots where each prompt stands once, followed by its completions, without padding."""
    return sum(p + sum(cs) for p, cs in lengths)


def two_phase_size(lengths: Sequence[tuple[int, Sequence[int]]]) -> int:
    """Token slots where the prompts are one padded batch and the completions, each without its last token, another."""
    completions = [c for _, cs in lengths for c in cs]
    return len(lengths) * max(p for p, _ in lengths) + len(completions) * (max(completions, default=1) - 1)


SIZES = {"padded": padded_size, "packed": packed_size, "two_phase": two_phase_size}
