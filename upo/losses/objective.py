"""What a run optimises: preference terms plus, optionally, the auxiliary term. Composed here, for every backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from upo.losses.auxiliary import Auxiliary
from upo.losses.base import Loss, Scores, Unit
from upo.ops import Array, Ops


@dataclass(frozen=True)
class Objective:
    """Weighted preference losses and the auxiliary term (UPO)."""

    preference: tuple[tuple[Loss, float], ...]
    auxiliary: Auxiliary | None = None

    @property
    def needs(self) -> frozenset[str]:
        """Union of what the terms need: reference, partners, rewards, value."""
        needs = frozenset[str]().union(*(loss.needs for loss, _ in self.preference))
        return needs | {"rewards", "value"} if self.auxiliary else needs

    @property
    def coupled(self) -> bool:
        """Whether a term must see the whole step's scores at once."""
        return any(loss.coupled for loss, _ in self.preference)

    def __call__(self, ops: Ops, scores: Scores) -> dict[str, Array]:
        """`loss` and its raw terms `loss/preference`, `loss/auxiliary`, `loss/value`, as scalars.

        For a micro-batch these are its share of the step's: summing over the step's micro-batches gives the step's value.
        """

        def mean(values: Array, unit: Unit) -> Array:
            return ops.sum(values) / max(scores.count[unit], 1)  # a step without a unit of this kind adds 0, not 0 / 0

        terms: dict[str, Any] = {}
        total: Any = 0.0
        if self.preference:
            terms["loss/preference"] = total = sum(w * mean(loss(ops, scores), loss.unit) for loss, w in self.preference)
        if aux := self.auxiliary:
            terms["loss/auxiliary"] = mean(aux.actor(ops, scores), "completion")
            terms["loss/value"] = mean(aux.value(ops, scores), "completion")
            for coefficient, name in ((aux.gamma, "loss/auxiliary"), (aux.value_coef, "loss/value")):
                if coefficient:  # a term that is switched off is reported, but cannot make the sum 0 * inf
                    total = total + coefficient * terms[name]
        return {"loss": total, **terms}
