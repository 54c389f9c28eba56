"""Losses on single completions that carry a label."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from upo.losses.base import Loss, Scores, Unit
from upo.ops import Array, Ops


@dataclass(frozen=True)
class KTO(Loss):
    """Kahneman-Tversky optimisation: desirable completions should rise above, undesirable ones fall below, a reference point z0.

        L(y) = lambda_D * (1 - s(beta * (g(y) - z0)))   if y is desirable
               lambda_U * (1 - s(beta * (z0 - g(y))))   if it is not
        z0   = max(0, mean of g(y'|x) over mismatched prompts and completions)

    g = log pi(y|x) - log ref(y|x) is summed over tokens, s is the sigmoid; beta > 0 is the strength of the tie to the reference;
    lambda_D = desirable_weight and lambda_U = undesirable_weight balance the labels: with n of each, the paper advises
    lambda_D n_D / (lambda_U n_U) in [1, 4/3]. z0 is a constant for the gradient; it is the mean over the partners of the whole
    optimizer step, whatever the micro-batches and ranks (one partner per completion, a completion of another prompt). One value per
    completion, [N]; a completion without a label is not accepted.

    Elsewhere: TRL rotates completions inside fixed chunks of the device batch; HALOs takes the next example of the batch.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    name: ClassVar[str] = "kto"
    unit: ClassVar[Unit] = "completion"
    data = "labels"
    needs = frozenset({"reference", "partners"})
    source: ClassVar[str] = "Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7"

    def __post_init__(self) -> None:
        if not 0 < self.beta < inf:
            raise ValueError(f"kto: beta must be above 0 and finite (got {self.beta})")
        weights = self.desirable_weight, self.undesirable_weight
        if not (min(weights) >= 0 and 0 < sum(weights) < inf):
            raise ValueError(f"kto: desirable_weight and undesirable_weight must be finite, not negative and not both 0 (got {weights})")

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        partners = scores.given("partner_logratio")
        z0 = ops.relu(ops.stop_gradient(ops.sum(partners) / partners.shape[0]))
        distance = self.beta * (scores.logratio() - z0)
        loss = ops.sigmoid(-scores.label * distance)  # 1 - s(z) = s(-z)
        return ops.where(scores.label > 0, self.desirable_weight * loss, self.undesirable_weight * loss)

    def implicit_reward(self, scores: Scores) -> Array:
        return self.beta * scores.logratio()
