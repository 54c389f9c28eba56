"""Losses on the margin between a chosen and a rejected completion."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from upo.losses.base import Loss, Scores, Unit
from upo.ops import Array, Ops


@dataclass(frozen=True)
class DPO(Loss):
    """Direct preference optimisation: the policy's log-ratio of the chosen completion should exceed that of the rejected one.

        L = -(1 - e) log s(beta * D) - e log s(-beta * D),     D = g(y_w) - g(y_l),     g(y) = log pi(y|x) - log ref(y|x)

    g is summed over tokens, s is the sigmoid; beta > 0 is the strength of the tie to the reference; e = label_smoothing in [0, 0.5) is
    the assumed share of flipped labels (cDPO). One value per pair, [P].

    Elsewhere: TRL >= 1.0 ignores label smoothing in its sigmoid loss; OpenRLHF, HALOs and TRL 0.x have this form.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    name: ClassVar[str] = "dpo"
    unit: ClassVar[Unit] = "pair"
    data = "pairs"
    needs = frozenset({"reference"})
    source: ClassVar[str] = "Rafailov et al. 2023, arXiv 2305.18290, eq. 7; label smoothing: Mitchell 2023, A note on DPO with noisy preferences (cDPO)"

    def __post_init__(self) -> None:
        if not 0 < self.beta < inf:
            raise ValueError(f"dpo: beta must be above 0 and finite (got {self.beta})")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"dpo: label_smoothing must be in [0, 0.5) (got {self.label_smoothing})")

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        logratio = scores.logratio()
        margin = self.beta * (ops.take(logratio, scores.chosen) - ops.take(logratio, scores.rejected))
        return -(1 - self.label_smoothing) * ops.log_sigmoid(margin) - self.label_smoothing * ops.log_sigmoid(-margin)

    def implicit_reward(self, scores: Scores) -> Array:
        return self.beta * scores.logratio()
