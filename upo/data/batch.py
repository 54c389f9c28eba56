"""Rows with their tokens and numbers (`Example`), one optimizer step of them (`Batch`), and its micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from upo import numpy_ops
from upo.data.forest import SIZES, Forest, Tokens
from upo.losses.base import Scores
from upo.ops import Ops


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
    anchor: Tokens | None = None  # what the base model answers
    ref_rewards: tuple[float, ...] | None = None  # rewards of answers that the reference gave to this prompt
    reward: tuple[float, ...] | None = None  # total auxiliary reward per completion
    ref_logp: tuple[float, ...] | None = None  # log-prob per completion under the (first) reference
    other_ref_logps: tuple[tuple[float, ...], ...] | None = None  # the same under each further reference
    ref_token_logp: tuple[np.ndarray, ...] | None = None  # log-prob per token of each completion, float32
    partners: tuple[Tokens, ...] | None = None  # KTO: a completion of another prompt for each completion
    partner_ref_logp: tuple[float, ...] | None = None
    anchor_ref_logp: float | None = None
    embedding: np.ndarray | None = None  # [E] float32, of the prompt, of unit length
    prompt_turns: tuple[dict[str, Any], ...] = ()  # the prompt as messages, where the row has a conversation

    @property
    def tokens(self) -> int:
        """Tokens with the prompt counted once."""
        return len(self.prompt) + sum(map(len, self.completions))


@dataclass(frozen=True)
class Places:
    """Where a micro-batch lies in its step: indices of its rows, completions and completion tokens."""

    rows: np.ndarray
    completions: np.ndarray
    tokens: np.ndarray

    def of(self, name: str) -> np.ndarray:
        """The indices of a vector of scores, by its name (`SCORED`)."""
        return {"row": self.rows, "completion": self.completions, "token": self.tokens}[SCORED[name]]


SCORED = {  # what a model says about a step, and one number per what
    "logp": "completion",
    "collision": "completion",
    "value": "row",
    "anchor_logp": "row",
    "token_logp": "token",
    "token_value": "token",
}


@dataclass(frozen=True)
class Batch:
    """The rows of one optimizer step (or a micro-batch of them): R rows, N completions, P pairs, M completion tokens. All NumPy."""

    origins: tuple[str, ...]  # [R]
    forest: Forest
    label: np.ndarray  # [N] float32
    chosen: np.ndarray  # [P] int64
    rejected: np.ndarray  # [P] int64
    count: dict[str, int]  # of the whole step, whatever part this is
    step: int
    columns: dict[str, np.ndarray] = field(default_factory=dict)  # [N] float32, those that every row has
    reward: np.ndarray | None = None  # [N] float32
    quantile: np.ndarray | None = None  # [N] float32, share of the row's ref_rewards that the reward reaches
    ref_rewards: np.ndarray | None = None  # [N] float32, how many ref_rewards the row has
    ref_logp: np.ndarray | None = None  # [N] float32
    other_ref_logps: np.ndarray | None = None  # [N, Q - 1] float32
    ref_token_logp: np.ndarray | None = None  # [M] float32
    partners: Forest | None = None  # same prompts and owners; completion i is the partner of completion i
    partner_ref_logp: np.ndarray | None = None  # [N] float32
    anchors: Forest | None = None  # same prompts, one completion each
    anchor_ref_logp: np.ndarray | None = None  # [R] float32
    embedding: np.ndarray | None = None  # [R, E] float32

    @property
    def scored(self) -> Forest:
        """What the policy scores with a gradient: the completions, then the anchors."""
        return self.forest if self.anchors is None else self.forest.join(self.anchors)

    def size(self, name: str) -> int:
        """Length of a vector of scores, by its name (`SCORED`)."""
        return {"row": len(self.origins), "completion": len(self.label), "token": int(self.forest.lengths.sum())}[SCORED[name]]

    def select(self, rows: Sequence[int]) -> tuple[Batch, Places]:
        """The micro-batch of the given rows, with the whole step's counts, and its places in this batch."""
        forest, kept = self.forest.select(rows)
        mine = np.isin(self.chosen, kept)
        ends = np.cumsum(self.forest.lengths)
        tokens = np.concatenate([np.arange(ends[i] - self.forest.lengths[i], ends[i]) for i in kept] or [np.zeros(0, np.int64)])
        places = Places(np.array(rows, np.int64), kept, tokens)
        by = {"completion": kept, "row": places.rows, "token": tokens}
        part = lambda a, unit="completion": None if a is None else a[by[unit]]  # noqa: E731
        return replace(
            self,
            origins=tuple(self.origins[r] for r in rows),
            forest=forest,
            label=self.label[kept],
            chosen=np.searchsorted(kept, self.chosen[mine]),
            rejected=np.searchsorted(kept, self.rejected[mine]),
            columns={name: column[kept] for name, column in self.columns.items()},
            reward=part(self.reward),
            quantile=part(self.quantile),
            ref_rewards=part(self.ref_rewards),
            ref_logp=part(self.ref_logp),
            other_ref_logps=part(self.other_ref_logps),
            ref_token_logp=part(self.ref_token_logp, "token"),
            partners=None if self.partners is None else self.partners.select(rows)[0],
            partner_ref_logp=part(self.partner_ref_logp),
            anchors=None if self.anchors is None else Forest(forest.prompts, tuple(self.anchors.completions[r] for r in rows), np.arange(len(rows))),
            anchor_ref_logp=part(self.anchor_ref_logp, "row"),
            embedding=part(self.embedding, "row"),
        ), places

    def scores(
        self,
        logp: np.ndarray,
        value: np.ndarray | None = None,
        partner_logratio: np.ndarray | None = None,
        *,
        others: Mapping[str, np.ndarray] | None = None,
        state: Mapping[str, float] | None = None,
    ) -> Scores:
        """NumPy scores of this batch. logp [N]; value [R] per prompt; partner_logratio [K] of the whole step; others by name (`SCORED`)."""
        lengths, owner = self.forest.lengths, self.forest.owner
        positive, negative = np.flatnonzero(self.label > 0), np.flatnonzero(self.label < 0)
        fixed = Scores(
            logp=logp,
            length=lengths.astype(np.float32),
            label=self.label,
            chosen=self.chosen,
            rejected=self.rejected,
            positive=positive,
            negative=negative,
            owner=owner,
            groups=len(self.origins),
            count=self.count,
            step=self.step,
            ref_logp=self.ref_logp,
            ref_logps=None if self.ref_logp is None or self.other_ref_logps is None else np.column_stack([self.ref_logp, self.other_ref_logps]).T,
            partner_logratio=partner_logratio,
            reward=self.reward,
            token_owner=np.repeat(np.arange(len(lengths)), lengths),
            token_index=np.concatenate([np.arange(n) for n in lengths] or [np.zeros(0)]).astype(np.float32),
            ref_token_logp=self.ref_token_logp,
            anchor_ref_logp=None if self.anchor_ref_logp is None else self.anchor_ref_logp[owner[self.chosen]],
            distance=None if self.embedding is None else 1 - self.embedding[owner[positive]] @ self.embedding[owner[negative]].T,
            quantile=self.quantile,
            ref_rewards=self.ref_rewards,
            columns=self.columns,
            state=state or {},
        )
        return with_scored(numpy_ops.ops, fixed, {"logp": logp, **({} if value is None else {"value": value}), **(others or {})})


def with_scored(ops: Ops, scores: Scores, found: Mapping[str, Any]) -> Scores:
    """The scores with what a model found, by name (`SCORED`): numbers per row are spread over its completions or its pair."""
    spread = dict(found)
    if "value" in spread:
        spread["value"] = ops.take(spread["value"], scores.owner)
    if "anchor_logp" in spread:
        spread["anchor_logp"] = ops.take(spread["anchor_logp"], ops.take(scores.owner, scores.chosen))
    return replace(scores, **spread)


def collate(examples: Sequence[Example], step: int = 0) -> Batch:
    """The batch of these rows. A number is present for all completions or for none of them."""
    owner = np.repeat(np.arange(len(examples)), [len(e.completions) for e in examples]).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum([len(e.completions) for e in examples])])[:-1]
    pairs = [int(s) for s, e in zip(starts, examples, strict=True) if e.kind == "pair"]
    prompts, completions = tuple(e.prompt for e in examples), tuple(c for e in examples for c in e.completions)
    label = np.array([v for e in examples for v in e.labels], np.float32)
    partners = [p for e in examples for p in e.partners or ()]
    anchors = [e.anchor for e in examples if e.anchor is not None]
    forest = Forest(prompts, completions, owner)
    names = [name for name in (examples[0].columns if examples else ()) if all(name in e.columns for e in examples)]
    others = _column(examples, "other_ref_logps", lambda v: list(zip(*v, strict=True)))
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
            "chosen_token": int(forest.lengths[label > 0].sum()),
        },
        step=step,
        columns={name: np.array([x for e in examples for x in e.columns[name]], np.float32) for name in names},
        reward=_column(examples, "reward"),
        **_quantiles(examples),
        ref_logp=_column(examples, "ref_logp"),
        other_ref_logps=others,
        ref_token_logp=_column(examples, "ref_token_logp", np.concatenate),
        partners=Forest(prompts, tuple(partners), owner) if partners else None,
        partner_ref_logp=_column(examples, "partner_ref_logp"),
        anchors=Forest(prompts, tuple(anchors), np.arange(len(examples))) if len(anchors) == len(examples) > 0 else None,
        anchor_ref_logp=_column(examples, "anchor_ref_logp", lambda v: [v]),
        embedding=_column(examples, "embedding", lambda v: [v]),
    )


def _column(examples: Sequence[Example], name: str, numbers: Callable[[Any], Iterable[Any]] = iter) -> np.ndarray | None:
    values = [getattr(e, name) for e in examples]
    if all(v is None for v in values):
        return None
    if any(v is None for v in values):
        raise ValueError(f"{name} is set on some rows only")
    return np.array([x for v in values for x in numbers(v)], np.float32)


def _quantiles(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """`quantile` and `ref_rewards` [N] where every row has rewards and reference rewards."""
    if not examples or any(e.reward is None or e.ref_rewards is None for e in examples):
        return {}
    known = [(np.asarray(e.ref_rewards), r) for e in examples for r in e.reward or ()]
    return {
        "quantile": np.array([np.mean(reference <= r) for reference, r in known], np.float32),
        "ref_rewards": np.array([len(reference) for reference, _ in known], np.float32),
    }


FEW_TOKENS = 2048  # of a micro-batch: where it is of no use to have more, on CPUs and Apple's GPUs
# What a micro-batch costs besides its token slots, in slots. A CPU is as fast with few; the layers of a GPU wait for their launch.
OVERHEAD = {"cpu": 64}
GPU_OVERHEAD = 1024


def micro_batches(batch: Batch, limit: int, at_least: int = 1, layout: str = "padded", device: str = "") -> list[list[int]]:
    """Partition of the batch's rows, each part within `limit` token slots of this layout (`SIZES`); an oversized row goes alone.

    Rows are taken from longest to shortest, so that a part holds rows of like length; one whose padding would cost this kind of device
    more than a micro-batch begins the next part. At least `at_least` parts are made while there are rows for them, one per rank, and
    then of about as many rows each. Deterministic.
    """
    sizes, overhead = _row_lengths(batch), OVERHEAD.get(device.split(":")[0], GPU_OVERHEAD)
    slots = lambda rows: SIZES[layout]([sizes[r] for r in rows])  # noqa: E731
    order = sorted(range(len(sizes)), key=lambda r: -(sizes[r][0] + max(sizes[r][1], default=0)))
    parts: list[list[int]] = []
    most = 0  # rows of the part being filled
    for done, row in enumerate(order):
        joined = slots((*parts[-1], row)) if parts and len(parts[-1]) < most else limit + 1
        if joined <= limit and joined <= slots(parts[-1]) + slots((row,)) + overhead:
            parts[-1].append(row)
        else:
            most = -(-(len(order) - done) // max(1, at_least - len(parts)))
            parts.append([row])
    return parts


def _row_lengths(batch: Batch) -> list[tuple[int, list[int]]]:
    sizes: list[tuple[int, list[int]]] = [(len(p), []) for p in batch.forest.prompts]
    scored = batch.scored
    for owner, length in zip(scored.owner, scored.lengths, strict=True):
        sizes[int(owner)][1].append(int(length))
    return sizes
