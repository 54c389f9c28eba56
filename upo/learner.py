"""What a learner does around its framework, the same on every backend: a rank's share of a step, and what is checked before an update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from upo.backend import Comm, ModelInfo, Outcome
from upo.data.batch import SCORED, Batch, Places, micro_batches
from upo.errors import NonFiniteError, RunError
from upo.losses import Objective, Scores
from upo.targets import some

Scored = dict[str, np.ndarray]
State = Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Part:
    """A micro-batch of this rank, and its places in the whole step's batch."""

    batch: Batch
    places: Places


def parts_of(batch: Batch, comm: Comm, info: ModelInfo) -> list[Part]:
    """This rank's micro-batches in this model's size and layout: r, r + W, ... Possibly none."""
    rows = micro_batches(batch, info.micro_batch_tokens, at_least=comm.size, layout=info.layout, device=info.device)
    return [Part(*batch.select(part)) for part in rows[comm.rank :: comm.size]]


def scored_names(needs: frozenset[str]) -> tuple[str, ...]:
    """What the policy has to say about each batch, as names of `upo.data.batch.SCORED`."""
    wanted = {
        "logp": True,
        "value": "value" in needs,
        "token_logp": bool(needs & {"tokens", "token_values"}),
        "token_value": "token_values" in needs,
        "collision": "collision" in needs,
        "anchor_logp": "anchors" in needs,
    }
    return tuple(name for name, asked in wanted.items() if asked)


def blank(batch: Batch, names: Iterable[str]) -> Scored:
    """Zeros for each vector of a whole step's scores."""
    return {name: np.zeros(batch.size(name), np.float32) for name in names}


def fill(whole: Scored, places: Places, found: Mapping[str, np.ndarray]) -> None:
    """Put what was found about a part into the whole step's vectors."""
    for name, vector in found.items():
        whole[name][places.of(name)] = vector


def sum_over_ranks(comm: Comm, whole: Scored) -> Scored:
    """The whole step's scores on every rank, from vectors that each rank has filled in part."""
    if comm.size == 1:
        return whole
    ends = np.cumsum([len(v) for v in whole.values()])[:-1]
    return dict(zip(whole, np.split(comm.all_sum(np.concatenate(list(whole.values()))), ends), strict=True))


def outcome_of(whole: Scored, partner_logp: np.ndarray | None, state: Mapping[str, float], norms: tuple[float, float] = (0.0, 0.0)) -> Outcome:
    """A step's scores as an `Outcome`."""
    others = {name: v for name, v in whole.items() if name not in ("logp", "value")}
    return Outcome(whole["logp"], whole.get("value"), partner_logp, *norms, others=others, state=state)


def scored_of(outcome: Outcome) -> Scored:
    """The scores of an `Outcome` by name."""
    return {"logp": outcome.logp, **({} if outcome.value is None else {"value": outcome.value}), **outcome.others}


def advanced(objective: Objective, batch: Batch, outcome: Outcome) -> dict[str, float]:
    """The objective's running statistics with this step's scores taken in; `outcome.state` holds those before."""
    return objective.advance(scores_of(batch, outcome))


def scores_of(batch: Batch, outcome: Outcome) -> Scores:
    """The float64 scores of a whole step. Partners' log-ratios are taken where policy and reference both scored them."""
    partners = None
    if outcome.partner_logp is not None and batch.partner_ref_logp is not None:
        partners = outcome.partner_logp.astype(np.float64) - batch.partner_ref_logp.astype(np.float64)
    scores = batch.scores(outcome.logp, outcome.value, partners, others=outcome.others, state=outcome.state)
    return scores.map(lambda a: np.asarray(a, np.float64), lambda a: a)


def partners_of(batch: Batch) -> Batch:
    """KTO's partners as a batch of their own, for micro-batches of their own: one long partner would pad a whole batch of short rows."""
    assert batch.partners is not None
    return replace(batch, forest=batch.partners, partners=None, anchors=None, ref_token_logp=None)


def partner_logratio(batch: Batch, partner_logp: np.ndarray | None) -> np.ndarray | None:
    """Whole-step log-ratios [N] of KTO's partners, None where there are none. Raises NonFiniteError."""
    if partner_logp is None:
        return None
    check_finite(batch, {"partner_logp": partner_logp})
    if batch.partner_ref_logp is None:
        raise ValueError("the batch has partners but no partner_ref_logp")
    return partner_logp - batch.partner_ref_logp


def loss_scales(dtype: str) -> tuple[float, ...]:
    """By what the loss is multiplied before its gradient is taken, and the gradient divided after. A gradient that is not finite is
    computed again with the next number.

    In float16, whose smallest number is 6e-8, what one token adds to the gradient of a step may be less (beta / rows / rank, times weights).
    Powers of two change nothing else.
    """
    return (1024.0, 32.0, 1.0) if dtype == "float16" else (1.0,)


def check_finite(batch: Batch, scores: Mapping[str, np.ndarray], gradient: Sequence[float] = ()) -> None:
    """Raise NonFiniteError naming the step and the rows at fault; all of the step's rows if only the gradient is not finite."""
    bad: set[int] = set()
    for name, vector in scores.items():
        unit, at = SCORED.get(name, "completion"), np.flatnonzero(~np.isfinite(vector))
        if unit == "token":
            at = np.repeat(np.arange(len(batch.label)), batch.forest.lengths)[at]
        bad |= {int(i) for i in (at if unit == "row" else batch.forest.owner[at])}
    if not bad and np.isfinite(gradient).all():
        return
    what = "scores that are not finite" if bad else "a gradient that is not finite"
    rows = sorted({batch.origins[i] for i in bad or range(len(batch.origins))})
    raise NonFiniteError(f"step {batch.step + 1}: {what}, in rows {some(rows)}. No weight was changed by this step. Lower optimizer.lr, or look at these rows.")


def check_like(given: State, own: State) -> None:
    """Raise RunError naming the first sections or arrays of a saved state that are missing, unexpected or of another shape."""
    for section in sorted({*given, *own}):
        a, b = given.get(section, {}), own.get(section, {})
        if missing := sorted(set(b) - set(a)):
            raise RunError(f"checkpoint: {section} lacks {some(missing)}. Was it written with another adapter, optimizer or objective?")
        if extra := sorted(set(a) - set(b)):
            raise RunError(f"checkpoint: {section} has {some(extra)}, which this run does not. Was it written with another adapter, optimizer or objective?")
        for name, array in b.items():
            if np.shape(a[name]) != array.shape:
                raise RunError(f"checkpoint: {section}: {name} has shape {list(np.shape(a[name]))}, this run's has {list(array.shape)}.")
