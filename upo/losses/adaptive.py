"""DPO and SimPO with a scale, margin or weight for every pair that follows from the scores themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from upo import numpy_ops
from upo.losses.base import CAP, Scores, bradley_terry, sides
from upo.losses.options import option
from upo.losses.pairwise import PairLoss
from upo.ops import Array, Ops

FLOOR = 1e-3  # least deviation of alpha_dpo's margins: before the first update all are equal


@dataclass(frozen=True)
class AdaDPO(PairLoss):
    """Adaptive preference scaling: clear pairs get a large scale, ambiguous ones a small one, found for every pair by a few Newton steps.

        L = -tau log(s(u / tau) + 1e-6),     u = beta * D
        tau = argmin over [tau_min, tau_max] of -tau log s(u / tau) + (rho - log 2) tau          penalty = linear
              the same with rho tau^2 for rho tau                                                penalty = quadratic

    The value leaves out (rho - log 2) tau, as the authors' code does, so it may rise while the margins do.
    tau is a constant for the gradient: newton_steps steps from tau = 1, each clipped to [tau_min, tau_max]. rho > 0 is the paper's
    rho_0; the paper merges beta into tau (beta = 1). One value per pair, [P].

    Elsewhere: the authors' code has beta 0.01, rho 0.1; it clips to tau_max in the quadratic form too, where the paper does not.
    """

    beta: float = option(1.0, above=0)
    rho: float = option(0.1, above=0)
    tau_min: float = option(0.1, above=0)
    tau_max: float = option(5.0, above=0)
    newton_steps: int = option(5, least=1)
    penalty: str = option("linear", choices=("linear", "quadratic"))

    name: ClassVar[str] = "ada_dpo"
    source: ClassVar[str] = "Hong et al. 2024, arXiv 2406.02764, eq. 5-12 and algorithm 1"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau_min > self.tau_max:
            raise ValueError(f"ada_dpo: tau_min must not be above tau_max (got {self.tau_min} and {self.tau_max})")

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        u = self.beta * self.difference(ops, scores)
        tau = ops.stop_gradient(self._scale(ops, ops.stop_gradient(u)))
        return -tau * ops.log(ops.sigmoid(u / tau) + 1e-6)

    def _scale(self, ops: Ops, u: Array) -> Array:
        tau = 0.0 * u + 1.0
        for _ in range(self.newton_steps):
            p, q = ops.sigmoid(u / tau), ops.sigmoid(-u / tau)
            slope = -ops.log(2 * p + 1e-6) + q * (u / tau)
            curvature = (u / tau) ** 2 * p * q / tau
            curvature = ops.where(curvature > 1e-6, curvature, 1e-6)
            if self.penalty == "linear":
                slope = slope + self.rho
            else:
                slope, curvature = slope + 2 * self.rho * tau, curvature + 2 * self.rho
            tau = tau - slope / curvature
            tau = ops.where(tau > self.tau_min, tau, self.tau_min)
            tau = ops.where(tau < self.tau_max, tau, self.tau_max)
        return tau


@dataclass(frozen=True)
class AlphaDPO(PairLoss):
    """Alpha-DPO: SimPO whose target margin is larger for pairs that the policy, compared with the reference, already separates well.

        L = -(1 - e) log s(z) - e log s(-z),     a = log pi(y_w) / |y_w| - log pi(y_l) / |y_l|
        z = beta * a - gamma - alpha * M*                   form = paper
        z = beta * (a - gamma - alpha * M*)                 form = code
        M* = (m - mean) / max(deviation, 0.001),            m = a - (log ref(y_w) / |y_w| - log ref(y_l) / |y_l|)

    M* is a constant for the gradient. mean and deviation are running averages over the optimizer steps (0.9 of the old, 0.1 of the step's mean and of
    its unbiased deviation), taken in before use; a step of one pair leaves the deviation as it is. form = paper estimates those of the
    data set, so the start at 0 is corrected for; form = code leaves it, as the authors' repository does. In the first step M* is 0:
    there is nothing yet to compare with. e = label_smoothing in [0, 0.5). Needs batches of at least two pairs. One value per pair, [P].

    Elsewhere: in the authors' code gamma is gamma_beta_ratio, and its published settings are beta 2.5-10, gamma 0.15-0.6, alpha 0.05-0.2.
    """

    beta: float = option(2.5, above=0)
    gamma: float = option(0.3, least=0)
    alpha: float = option(0.05, least=0)
    form: str = option("paper", choices=("paper", "code"))
    label_smoothing: float = option(0.0, least=0, below=0.5)

    name: ClassVar[str] = "alpha_dpo"
    coupled: ClassVar[bool] = True
    source: ClassVar[str] = "Wu et al. 2024, arXiv 2410.10148, eq. 8-12; junkangwu/alpha-DPO"

    def check_run(self, references: int, batch_size: int) -> None:
        if batch_size < 2:
            raise ValueError("train.batch_size: alpha_dpo compares the pairs of a step; it needs at least 2")

    def initial_state(self) -> dict[str, float]:
        return {"steps": 0.0, "spread_steps": 0.0, "mean": 0.0, "deviation": 0.0}

    def advance(self, scores: Scores) -> dict[str, float]:
        m, state = self._advantage(numpy_ops.ops, scores), dict(scores.state)
        if len(m):
            state["steps"] += 1
            state["mean"] = 0.9 * state["mean"] + 0.1 * float(np.mean(m))
        if len(m) > 1:
            state["spread_steps"] += 1
            state["deviation"] = 0.9 * state["deviation"] + 0.1 * float(np.std(m, ddof=1))
        return state

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        margin = self._per_token(ops, scores, scores.logp)
        offset = self.gamma + self.alpha * ops.stop_gradient(self._standardised(self._advantage(ops, scores), scores.state))
        z = self.beta * margin - offset if self.form == "paper" else self.beta * (margin - offset)
        return bradley_terry(ops, z, self.label_smoothing)

    def implicit_reward(self, scores: Scores) -> Array:
        return self.beta * scores.mean_logp()

    def _standardised(self, m: Array, state: Mapping[str, float]) -> Array:
        if state["steps"] <= 1:
            return 0.0 * m
        mean, deviation = state["mean"], state["deviation"]
        if self.form == "paper":
            mean = mean / (1 - 0.9 ** state["steps"])
            deviation = deviation / (1 - 0.9 ** state["spread_steps"]) if state["spread_steps"] else 0.0
        return (m - mean) / max(deviation, FLOOR)

    def _advantage(self, ops: Ops, scores: Scores) -> Array:
        return self._per_token(ops, scores, scores.logp) - self._per_token(ops, scores, scores.given("ref_logp"))

    def _per_token(self, ops: Ops, scores: Scores, logp: Array) -> Array:
        w, l = sides(ops, scores, logp / scores.length)
        return w - l


@dataclass(frozen=True)
class WPO(PairLoss):
    """Weighted preference optimisation: pairs that the policy itself would write count for more, as if the data were on-policy.

        L = -min(1, w(y_w) w(y_l)) log s(beta * D),     w(y) = exp((1 / |y|) sum_t [log pi(y_t) - log sum_v pi(v)^2])

    v runs over the vocabulary at every position. The weight is a constant for the gradient. clamp = one cuts it at 1, clamp = none does
    not (its exponent is then capped at 80). beta > 0 as in DPO. One value per pair, [P].

    Elsewhere: the authors' code and TRL 0.x clamp, TRL >= 1.0 does not.
    """

    beta: float = option(0.01, above=0)
    clamp: str = option("one", choices=("one", "none"))

    name: ClassVar[str] = "wpo"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "collision"})
    source: ClassVar[str] = "Zhou et al. 2024, arXiv 2406.11827, eq. 3-5; wzhouad/WPO"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        typical_w, typical_l = sides(ops, scores, (ops.stop_gradient(scores.logp) - scores.given("collision")) / scores.length)
        exponent, cap = typical_w + typical_l, 0.0 if self.clamp == "one" else CAP
        weight = ops.exp(ops.where(exponent > cap, cap, exponent))
        return weight * bradley_terry(ops, self.beta * self.difference(ops, scores))
