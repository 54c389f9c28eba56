"""What a learner does around its framework, the same on every backend: a rank's share of a step, and what is checked before an update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from upo.backend import Comm
from upo.data.batch import Batch, micro_batches
from upo.errors import NonFiniteError, RunError
from upo.targets import some

State = Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Part:
    """A micro-batch of this rank, with its rows and completions as indices into the whole step's batch."""

    batch: Batch
    rows: list[int]
    completions: np.ndarray


def parts_of(batch: Batch, limit: int, comm: Comm) -> list[Part]:
    """This rank's micro-batches of at most `limit` padded tokens: r, r + W, ... Possibly none."""
    rows = micro_batches(batch, limit, at_least=comm.size)
    return [Part(selected, part, kept) for part in rows[comm.rank :: comm.size] for selected, kept in [batch.select(part)]]


def partners_of(batch: Batch) -> Batch:
    """KTO's partners as a batch of their own, for micro-batches of their own: one long partner would pad a whole batch of short rows."""
    assert batch.partners is not None
    return replace(batch, forest=batch.partners, partners=None)


def partner_logratio(batch: Batch, partner_logp: np.ndarray | None) -> np.ndarray | None:
    """Whole-step log-ratios [N] of KTO's partners, None where there are none. Raises NonFiniteError."""
    if partner_logp is None:
        return None
    check_finite(batch, partner_logp=partner_logp)
    if batch.partner_ref_logp is None:
        raise ValueError("the batch has partners but no partner_ref_logp")
    return partner_logp - batch.partner_ref_logp


def check_finite(
    batch: Batch,
    logp: np.ndarray | None = None,
    partner_logp: np.ndarray | None = None,
    value: np.ndarray | None = None,
    gradient: np.ndarray | None = None,
) -> None:
    """Raise NonFiniteError naming the step and the rows at fault; all of the step's rows if only the gradient is not finite."""
    bad: set[int] = set()
    for scores in (logp, partner_logp):
        if scores is not None:
            bad |= {int(batch.forest.owner[i]) for i in np.flatnonzero(~np.isfinite(scores))}
    if value is not None:
        bad |= {int(i) for i in np.flatnonzero(~np.isfinite(value))}
    if not bad and (gradient is None or np.isfinite(gradient).all()):
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
