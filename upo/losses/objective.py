"""What a run optimises: preference terms plus, optionally, the auxiliary term. Composed here, for every backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from upo.losses.auxiliary import Auxiliary
from upo.losses.base import Loss, Scores, Unit
from upo.ops import Array, Ops


@dataclass(frozen=True)
class Term:
    """A preference loss with its weight and, optionally, the numeric column that weighs each of its values.

    Values are still divided by the step's count of their unit, so a column of twos doubles the term. A pair's weight is its chosen
    completion's. Raises ValueError for a loss whose values do not belong to single rows' pairs or completions.
    """

    loss: Loss
    weight: float = 1.0
    weight_column: str | None = None

    def __post_init__(self) -> None:
        if self.weight_column is not None and (self.loss.coupled or self.loss.unit not in ("pair", "completion", "chosen")):
            raise ValueError(f"{self.loss.name}: weight_column does not work with it, as its values are not those of single rows")

    def values(self, ops: Ops, scores: Scores) -> Array:
        """The loss per unit, weighted by the column."""
        values = self.loss(ops, scores)
        if self.weight_column is None:
            return values
        column = scores.column(self.weight_column)
        return values * (ops.take(column, scores.chosen) if self.loss.unit == "pair" else column)


@dataclass(frozen=True)
class Objective:
    """Weighted preference losses and the auxiliary term (UPO)."""

    preference: tuple[Term, ...]
    auxiliary: Auxiliary | None = None

    @property
    def needs(self) -> frozenset[str]:
        """Union of what the terms need (`upo.losses.base.NEEDS`)."""
        needs = frozenset[str]().union(*(term.loss.requires() for term in self.preference))
        return needs | {"rewards", "value"} if self.auxiliary else needs

    @property
    def coupled(self) -> bool:
        """Whether a term must see the whole step's scores at once."""
        return any(term.loss.coupled for term in self.preference)

    @property
    def columns(self) -> tuple[str, ...]:
        """Numeric columns that the rows must bring."""
        names = [name for term in self.preference for name in (*term.loss.columns(), *((term.weight_column,) if term.weight_column else ()))]
        return tuple(dict.fromkeys(names))

    @property
    def expectile(self) -> float:
        """What the value head is fitted to before the first step; 0.5, the mean reward, without an auxiliary term."""
        return self.auxiliary.expectile if self.auxiliary else 0.5

    def initial_state(self) -> dict[str, float]:
        """Running statistics of all terms before the first step, by `<place>.<loss>.<name>`."""
        return {_key(i, term, name): v for i, term in enumerate(self.preference) for name, v in term.loss.initial_state().items()}

    def advance(self, scores: Scores) -> dict[str, float]:
        """The running statistics with this step taken in: `scores` are the whole step's, in NumPy, with the state before it."""
        return {_key(i, t, name): v for i, t in enumerate(self.preference) for name, v in t.loss.advance(_own(scores, i, t)).items()}

    def __call__(self, ops: Ops, scores: Scores) -> dict[str, Array]:
        """`loss` and its raw terms `loss/preference`, `loss/auxiliary`, `loss/value`, as scalars.

        For a micro-batch these are its share of the step's: summing over the step's micro-batches gives the step's value.
        """

        def mean(values: Array, unit: Unit) -> Array:
            return ops.sum(values) / max(scores.count[unit], 1)  # a step without a unit of this kind adds 0, not 0 / 0

        terms: dict[str, Any] = {}
        total: Any = 0.0
        if self.preference:
            shares = [t.weight * mean(t.values(ops, _own(scores, i, t)), t.loss.unit) for i, t in enumerate(self.preference)]
            terms["loss/preference"] = total = sum(shares)
        if aux := self.auxiliary:
            terms["loss/auxiliary"] = mean(aux.actor(ops, scores), "completion")
            terms["loss/value"] = mean(aux.value(ops, scores), "completion")
            for coefficient, name in ((aux.gamma, "loss/auxiliary"), (aux.value_coef, "loss/value")):
                if coefficient:  # a term that is switched off is reported, but cannot make the sum 0 * inf
                    total = total + coefficient * terms[name]
        return {"loss": total, **terms}


def _key(place: int, term: Term, name: str) -> str:
    return f"{place}.{term.loss.name}.{name}"


def _own(scores: Scores, place: int, term: Term) -> Scores:
    """The scores with the running statistics of one term, under their own names."""
    names = term.loss.initial_state()
    state: Mapping[str, float] = {name: scores.state[_key(place, term, name)] for name in names}
    return replace(scores, state=state) if names or scores.state else scores
