"""Figures of the work a step takes: derived from its rows alone, as every rank cuts them into the same micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from upo.backend import ModelInfo
from upo.data.batch import Batch, micro_batches
from upo.data.forest import SIZES, Forest
from upo.flops import Work, backward_flops, forward_flops, peak_flops
from upo.learner import partners_of


def forest_work(forest: Forest, layout: str) -> Work:
    """One micro-batch in this layout. In two phases a completion's last token, from which nothing is predicted, is not computed."""
    lengths: list[tuple[int, list[int]]] = [(len(p), []) for p in forest.prompts]
    for owner, length in zip(forest.owner, forest.lengths, strict=True):
        lengths[int(owner)][1].append(int(length))
    slots, scored = SIZES[layout](lengths), int(forest.lengths.sum())
    if layout == "padded":
        texts = [p + c for p, cs in lengths for c in (cs or [0])]
        return Work(slots, sum(texts), 0, sum(map(_triangle, texts)), scored)
    if layout == "two_phase":
        lengths = [(p, [c - 1 for c in cs]) for p, cs in lengths]
    tokens = sum(p + sum(cs) for p, cs in lengths)
    pairs = sum(_triangle(p) + sum(p * c + _triangle(c) for c in cs) for p, cs in lengths)
    return Work(slots, tokens, sum(p * max(0, len(cs) - 1) for p, cs in lengths), pairs, scored)


def batch_work(batch: Batch, ranks: int, info: ModelInfo) -> tuple[Work, Work]:
    """Over all micro-batches and ranks: the rows' completions and anchors, and KTO's partners."""

    def total(whole: Batch) -> Work:
        parts = micro_batches(whole, info.micro_batch_tokens, at_least=ranks, layout=info.layout, device=info.device)
        return sum((forest_work(whole.select(rows)[0].scored, info.layout) for rows in parts), Work())

    return total(batch), Work() if batch.partners is None else total(partners_of(batch))


def evaluation_work(batch: Batch, ranks: int, info: ModelInfo) -> tuple[Work, Work]:
    """The same for an evaluation, which is first cut into what all ranks score together."""
    own, partners = Work(), Work()
    for rows in micro_batches(batch, info.micro_batch_tokens * ranks, layout=info.layout, device=info.device):
        first, second = batch_work(batch.select(rows)[0], ranks, info)
        own, partners = own + first, partners + second
    return own, partners


def figures(work: tuple[Work, Work], info: ModelInfo, seconds: float, ranks: int, *, trained: bool) -> dict[str, float | int]:
    """`slots`, `padding`, `shared_tokens` and, where model and device are known, `mfu` (`upo.training.metrics.NAMES`)."""
    own, partners = work
    both = own + partners
    found: dict[str, float | int] = {
        "slots": both.slots,
        "padding": 1 - both.tokens / max(1, both.slots),
        "shared_tokens": both.saved / max(1, both.tokens + both.saved),
    }
    peak = peak_flops(info.chip, info.dtype)
    if info.sizes is not None and peak is not None:
        needed = forward_flops(info.sizes, both) + (backward_flops(info.sizes, own) if trained else 0)
        found["mfu"] = needed / (max(seconds, 1e-9) * peak * ranks)
    return found


def averages(lines: Iterable[Mapping[str, Any]]) -> dict[str, float | int]:
    """Over a run, from the training lines of metrics.jsonl, which a resumed run has cut to its checkpoint: each step counts once.

    Total `slots`; `padding` and `shared_tokens` of all of them together; `tokens_per_s` and `mfu` over the seconds of the steps (that have
    an `mfu`). Lines without these figures, of an earlier version, do not count.
    """
    lines = [line for line in lines if not line.get("eval") and "slots" in line]
    held = [line["slots"] * (1 - line["padding"]) for line in lines]
    texts = [tokens / (1 - line["shared_tokens"]) for tokens, line in zip(held, lines, strict=True)]
    slots = sum(line["slots"] for line in lines)
    found: dict[str, float | int] = {"slots": slots}
    if slots:
        found |= {"padding": 1 - sum(held) / slots, "shared_tokens": 1 - sum(held) / sum(texts)}
    for name in ("tokens_per_s", "mfu"):
        if timed := [line for line in lines if name in line]:
            found[name] = sum(line[name] * line["seconds"] for line in timed) / max(sum(line["seconds"] for line in timed), 1e-9)
    return found


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
