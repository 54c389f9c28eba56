"""UPO's auxiliary term: advantage-weighted likelihood on scored completions, and the value head's regression."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from upo.losses.base import Scores
from upo.ops import Array, Ops


@dataclass(frozen=True)
class Auxiliary:
    """Advantage-weighted likelihood with an expectile value head.

        R = sum_i w_i r_i(x, y),     A = R - stop_gradient(V(x))
        actor(y) = -exp(lambda * A) * (1 / |y|) log pi(y|x)
        value(y) = |tau - 1(R - V < 0)| * (R - V)^2
        L        = L_preference + gamma * mean(actor) + c_v * mean(value)      over all scored completions, chosen and rejected

    lambda = temperature, tau = expectile, gamma, c_v = value_coef. The actor is off for the first `actor_warmup_steps` optimizer
    steps. The weight exp(lambda * A) is a constant for the gradient; V gets its gradient from `value` alone.

    tau is not given in the paper (0.7 is IQL's); lambda = 5 is the paper's, gamma = 0.5 and 100 warm-up steps are its preset `paper`.
    gamma = 0.3 moved goals and kept preference accuracy above chance on a model of 135M parameters; from 1 on the goals had all the say.
    """

    gamma: float = 0.3
    temperature: float = 5.0
    value_coef: float = 0.1
    expectile: float = 0.7
    actor_warmup_steps: int = 0

    source: ClassVar[str] = "Badrinath et al. 2024 (UPO), arXiv 2405.17956, eq. 10-12, 27 of the ICLR 2025 submission; expectile: Kostrikov et al. 2021, eq. 5"

    def __post_init__(self) -> None:
        for option in ("gamma", "temperature", "value_coef"):
            if not 0 <= getattr(self, option) < inf:
                raise ValueError(f"auxiliary: {option} must be finite and not negative (got {getattr(self, option)})")
        if not 0 < self.expectile < 1:
            raise ValueError(f"auxiliary: expectile must be between 0 and 1 (got {self.expectile})")

    def weight(self, ops: Ops, scores: Scores) -> Array:
        """[N] exp(lambda * A), a constant."""
        return ops.exp(self.temperature * (scores.given("reward") - ops.stop_gradient(scores.given("value"))))

    def actor(self, ops: Ops, scores: Scores) -> Array:
        """[N], zero during the warm-up."""
        if scores.step < self.actor_warmup_steps:
            return 0.0 * scores.logp  # whatever the weights are: an untrained V may make them infinite
        return -self.weight(ops, scores) * scores.logp / scores.length

    def value(self, ops: Ops, scores: Scores) -> Array:
        """[N] expectile regression of R on V(x)."""
        return expectile_loss(ops, scores.given("reward") - scores.given("value"), self.expectile)


def expectile_loss(ops: Ops, residual: Array, expectile: float) -> Array:
    """|tau - 1(u < 0)| u^2, elementwise; minimised by the tau-expectile of the targets."""
    square = residual * residual
    return ops.where(residual < 0, (1 - expectile) * square, expectile * square)
