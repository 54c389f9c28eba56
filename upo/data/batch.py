"""Rows with their tokens and numbers (`Example`), one optimizer step of them (`Batch`), and its micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from upo.data.forest import Forest, Tokens, padded_size
from upo.losses.base import Scores


@dataclass(frozen=True)
class Example:
    """One row: a prompt and its completions; a pair is (chosen, rejected) in this order."""

    origin: str  # "train.jsonl:17", for messages
    kind: str  # pair, unpaired or group
    prompt: Tokens
    completions: tuple[Tokens, ...]
    labels: tuple[int, ...]  # +1, -1, or 0 where the row has none
    texts: tuple[str, ...] = ()  # the completions as text, for scorers
    prompt_text: str = ""  # the prompt as text, for scorers
    columns: dict[str, tuple[float, ...]] = field(default_factory=dict)  # numeric columns, one number per completion
    reward: tuple[float, ...] | None = None  # total auxiliary reward per completion
    ref_logp: tuple[float, ...] | None = None  # reference log-prob per completion
    partners: tuple[Tokens, ...] | None = None  # KTO: a completion of another prompt for each completion
    partner_ref_logp: tuple[float, ...] | None = None

    @property
    def tokens(self) -> int:
        """Tokens with the prompt counted once."""
        return len(self.prompt) + sum(map(len, self.completions))


@dataclass(frozen=True)
class Batch:
    """The rows of one optimizer step (or a micro-batch of them): R rows, N completions, P pairs. All NumPy."""

    origins: tuple[str, ...]  # [R]
    forest: Forest
    label: np.ndarray  # [N] float32
    chosen: np.ndarray  # [P] int64
    rejected: np.ndarray  # [P] int64
    count: dict[str, int]  # of the whole step, whatever part this is
    step: int
    reward: np.ndarray | None = None  # [N] float32
    ref_logp: np.ndarray | None = None  # [N] float32
    partners: Forest | None = None  # same prompts and owners; completion i is the partner of completion i
    partner_ref_logp: np.ndarray | None = None  # [N] float32

    def select(self, rows: Sequence[int]) -> tuple[Batch, np.ndarray]:
        """The micro-batch of the given rows, with the whole step's counts, and its completions' indices [n] in this batch."""
        forest, kept = self.forest.select(rows)
        new = {int(old): i for i, old in enumerate(kept)}
        pairs = [(new[int(c)], new[int(r)]) for c, r in zip(self.chosen, self.rejected, strict=True) if int(c) in new]
        part = lambda a: None if a is None else a[kept]  # noqa: E731
        return replace(
            self,
            origins=tuple(self.origins[r] for r in rows),
            forest=forest,
            label=self.label[kept],
            chosen=np.array([c for c, _ in pairs], np.int64),
            rejected=np.array([r for _, r in pairs], np.int64),
            reward=part(self.reward),
            ref_logp=part(self.ref_logp),
            partners=None if self.partners is None else self.partners.select(rows)[0],
            partner_ref_logp=part(self.partner_ref_logp),
        ), kept

    def scores(self, logp: np.ndarray, value: np.ndarray | None = None, partner_logratio: np.ndarray | None = None) -> Scores:
        """NumPy scores of this batch. logp [N]; value [R] per prompt; partner_logratio [K] of the whole step."""
        return Scores(
            logp=logp,
            length=self.forest.lengths.astype(np.float32),
            label=self.label,
            chosen=self.chosen,
            rejected=self.rejected,
            count=self.count,
            step=self.step,
            ref_logp=self.ref_logp,
            partner_logratio=partner_logratio,
            reward=self.reward,
            value=None if value is None else value[self.forest.owner],
        )


def collate(examples: Sequence[Example], step: int = 0) -> Batch:
    """The batch of these rows. A number is present for all completions or for none of them."""
    owner = np.repeat(np.arange(len(examples)), [len(e.completions) for e in examples]).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum([len(e.completions) for e in examples])])[:-1]
    pairs = [int(s) for s, e in zip(starts, examples, strict=True) if e.kind == "pair"]
    prompts, completions = tuple(e.prompt for e in examples), tuple(c for e in examples for c in e.completions)
    label = np.array([v for e in examples for v in e.labels], np.float32)
    partners = [p for e in examples for p in e.partners or ()]
    forest = Forest(prompts, completions, owner)
    return Batch(
        origins=tuple(e.origin for e in examples),
        forest=forest,
        label=label,
        chosen=np.array(pairs, np.int64),
        rejected=np.array(pairs, np.int64) + 1,
        count={
            "pair": len(pairs),
            "completion": len(completions),
            "chosen": int((label > 0).sum()),
            "group": len(examples),
            "token": int(forest.lengths.sum()),
        },
        step=step,
        reward=_column(examples, "reward"),
        ref_logp=_column(examples, "ref_logp"),
        partners=Forest(prompts, tuple(partners), owner) if partners else None,
        partner_ref_logp=_column(examples, "partner_ref_logp"),
    )


def _column(examples: Sequence[Example], name: str) -> np.ndarray | None:
    values = [getattr(e, name) for e in examples]
    if all(v is None for v in values):
        return None
    if any(v is None for v in values):
        raise ValueError(f"{name} is set on some rows only")
    return np.array([x for v in values for x in v], np.float32)


def micro_batches(batch: Batch, limit: int, at_least: int = 1, multiple: int = 1) -> list[list[int]]:
    """Partition of the batch's rows, each part within `limit` padded token slots; an oversized row goes alone.

    Rows are taken from longest to shortest, so that a part holds rows of like length. At least `at_least` parts are made while there
    are rows for them, one per rank, and then of about as many rows each. Deterministic.
    """
    sizes = _row_lengths(batch)
    order = sorted(range(len(sizes)), key=lambda r: -(sizes[r][0] + max(sizes[r][1], default=0)))
    parts: list[list[int]] = []
    most = 0  # rows of the part being filled
    for done, row in enumerate(order):
        if parts and len(parts[-1]) < most and padded_size([sizes[r] for r in (*parts[-1], row)], multiple) <= limit:
            parts[-1].append(row)
        else:
            most = -(-(len(order) - done) // max(1, at_least - len(parts)))
            parts.append([row])
    return parts


def _row_lengths(batch: Batch) -> list[tuple[int, list[int]]]:
    sizes: list[tuple[int, list[int]]] = [(len(p), []) for p in batch.forest.prompts]
    for owner, length in zip(batch.forest.owner, batch.forest.lengths, strict=True):
        sizes[int(owner)][1].append(int(length))
    return sizes
