"""What every loss sees (`Scores`) and what every loss declares (`Loss`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

from upo.ops import Array, Ops

Unit = Literal["pair", "completion", "chosen", "group", "token"]


@dataclass(frozen=True)
class Scores:
    """Numbers per scored completion, for the whole optimizer step or for one micro-batch of it.

    N completions, P pairs, K partners. `count` is always that of the *whole* optimizer step over all micro-batches and ranks, so that
    the terms of the micro-batches add up to the term of the step. `partner_logratio`, too, always holds the whole step's.
    """

    logp: Array  # [N] summed log-prob of each completion under the policy; the only field, with `value`, that carries a gradient
    length: Array  # [N] number of scored tokens
    label: Array  # [N] +1 chosen or desirable, -1 rejected or undesirable, 0 neither
    chosen: Array  # [P] integer index into N
    rejected: Array  # [P] integer index into N
    count: Mapping[str, int]  # units in the whole step: pair, completion, chosen, group, token
    step: int = 0  # optimizer steps done before this one
    ref_logp: Array | None = None  # [N] summed log-prob under the reference
    partner_logratio: Array | None = None  # [K] log pi - log ref of KTO's mismatched completions, constants
    reward: Array | None = None  # [N] total auxiliary reward R = sum_i w_i r_i, constants
    value: Array | None = None  # [N] V(x) of each completion's prompt

    def map(self, floats: Callable[[Any], Array], indices: Callable[[Any], Array]) -> Scores:
        """The same scores with float arrays and index arrays each converted, e.g. from NumPy to a framework."""
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("chosen", "rejected"):
                changed[field.name] = indices(value)
            elif field.name not in ("count", "step") and value is not None:
                changed[field.name] = floats(value)
        return replace(self, **changed)

    def given(self, name: str) -> Array:
        """An optional field that a loss needs. Raises ValueError where the scores do not bring it."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"the objective needs {name}, but the scores have none")
        return value

    def logratio(self) -> Array:
        """log pi(y|x) - log ref(y|x), [N]."""
        return self.logp - self.given("ref_logp")


@dataclass(frozen=True)
class Loss:
    """A term of the objective: its fields are its options, its docstring is its documentation.

    Calling it returns one value per unit present in `scores`, unreduced; the objective sums them and divides once by the step's count
    of that unit. A `coupled` loss mixes units of a step beyond what `partner_logratio` and `count` carry, so it is given the whole
    step at once and its gradient is taken with respect to the vector of scores.
    """

    name: ClassVar[str]
    unit: ClassVar[Unit]
    data: ClassVar[Literal["pairs", "labels", "chosen", "scored"]]  # the least a row must bring
    needs: ClassVar[frozenset[str]] = frozenset()  # of: reference, partners, rewards, value
    coupled: ClassVar[bool] = False
    source: ClassVar[str]  # paper, equation and identifier

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        raise NotImplementedError

    def implicit_reward(self, scores: Scores) -> Array:
        """[N], constants for the metrics `accuracy` and `margin`: what this loss takes the completions to be worth."""
        raise NotImplementedError
