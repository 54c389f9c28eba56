"""What a run optimises: preference terms plus, optionally, the auxiliary term. Composed here, for every backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from upo.losses.auxiliary import Auxiliary
from upo.losses.base import Loss, Scores
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
        terms: dict[str, Any] = {}
        total: Any = 0.0
        if self.preference:
            terms["loss/preference"] = sum(w * ops.sum(loss(ops, scores)) / scores.count[loss.unit] for loss, w in self.preference)
            total = total + terms["loss/preference"]
        if self.auxiliary:
            n = scores.count["completion"]
            terms["loss/auxiliary"] = ops.sum(self.auxiliary.actor(ops, scores)) / n
            terms["loss/value"] = ops.sum(self.auxiliary.value(ops, scores)) / n
            total = total + self.auxiliary.gamma * terms["loss/auxiliary"] + self.auxiliary.value_coef * terms["loss/value"]
        return {"loss": total, **terms}
