"""Losses on single completions that carry a label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from upo.losses.base import Data, Loss, Scores, Unit
from upo.losses.options import option
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

    beta: float = option(0.1, above=0)
    desirable_weight: float = option(1.0, least=0)
    undesirable_weight: float = option(1.0, least=0)

    name: ClassVar[str] = "kto"
    unit: ClassVar[Unit] = "completion"
    data: ClassVar[Data] = "labels"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "partners"})
    source: ClassVar[str] = "Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.desirable_weight + self.undesirable_weight == 0:
            raise ValueError("kto: desirable_weight and undesirable_weight must not both be 0")

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        partners = scores.given("partner_logratio")
        z0 = ops.relu(ops.stop_gradient(ops.sum(partners) / partners.shape[0]))
        distance = self.beta * (scores.logratio() - z0)
        loss = ops.sigmoid(-scores.label * distance)  # 1 - s(z) = s(-z)
        return ops.where(scores.label > 0, self.desirable_weight * loss, self.undesirable_weight * loss)


@dataclass(frozen=True)
class APOZeroUnpaired(Loss):
    """Anchored preference optimisation on single completions: KTO without a reference point.

        L(y) = 1 - s(beta * g(y))   if y is desirable
               s(beta * g(y))       if it is not

    g = log pi(y|x) - log ref(y|x) is summed over tokens; beta > 0 is the strength of the tie to the reference. No mismatched
    completions are scored. One value per completion, [N]; a completion without a label is not accepted.
    """

    beta: float = option(0.1, above=0)

    name: ClassVar[str] = "apo_zero_unpaired"
    unit: ClassVar[Unit] = "completion"
    data: ClassVar[Data] = "labels"
    needs: ClassVar[frozenset[str]] = frozenset({"reference"})
    source: ClassVar[str] = "D'Oosterlinck et al. 2024, arXiv 2408.06266, APO-zero; TRL's KTO trainer, apo_zero_unpaired"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        return ops.sigmoid(-scores.label * self.beta * scores.logratio())


@dataclass(frozen=True)
class BCO(Loss):
    """Binary classifier optimisation: desirable completions above the mean reward, undesirable ones below it.

        L(y) = -log s(r(y) - delta)   if y is desirable
               -log s(delta - r(y))   if it is not,            r(y) = beta * g(y)

    delta is a constant for the gradient: the mean of r over all completions that have been trained on so far, this optimizer step's
    included. beta > 0 is the strength of the tie to the reference. One value per completion, [N].

    Elsewhere: TRL can also weigh undesirable completions by how alike their prompts are to desirable ones (UDM); that is not offered.
    """

    beta: float = option(0.1, above=0)

    name: ClassVar[str] = "bco"
    unit: ClassVar[Unit] = "completion"
    data: ClassVar[Data] = "labels"
    needs: ClassVar[frozenset[str]] = frozenset({"reference"})
    coupled: ClassVar[bool] = True
    source: ClassVar[str] = "Jung et al. 2024, arXiv 2404.04656, eq. 8-9; TRL's BCO trainer"

    def initial_state(self) -> dict[str, float]:
        return {"sum": 0.0, "count": 0.0}

    def advance(self, scores: Scores) -> dict[str, float]:
        rewards = self.implicit_reward(scores)
        return {"sum": scores.state["sum"] + float(np.sum(rewards)), "count": scores.state["count"] + len(rewards)}

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        delta = scores.state["sum"] / max(scores.state["count"], 1.0)
        return -ops.log_sigmoid(scores.label * (self.implicit_reward(scores) - delta))
