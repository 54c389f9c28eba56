"""Preference losses that know by how much one completion is better: from rewards R = sum_i w_i r_i of the run's goals."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log, log1p
from typing import ClassVar

from upo.losses.base import Data, Loss, Scores, Unit, bradley_terry, sides
from upo.losses.options import option
from upo.losses.pairwise import PairLoss
from upo.ops import Array, Ops


@dataclass(frozen=True)
class NemoRPO(PairLoss):
    """Reward-aware preference optimisation (NeMo): the implicit reward margin should equal the known one, not exceed it without bound.

        G = eta * (R(y_w) - R(y_l)),     x = beta * D,     D = g(y_w) - g(y_l)
        L = s(G) (log s(G) - log s(x)) + s(-G) (log s(-G) - log s(-x))     form = backward_kl
        L = s(x) (log s(x) - log s(G)) + s(-x) (log s(-x) - log s(-G))     form = forward_kl
        L = (x - G)^2                                                       form = squared

    R is the total reward of the objective's goals; eta > 0 is its scale, beta > 0 as in DPO. One value per pair, [P].
    """

    beta: float = option(0.2, above=0)
    eta: float = option(1.0, above=0)
    form: str = option("backward_kl", choices=("backward_kl", "forward_kl", "squared"))

    name: ClassVar[str] = "nemo_rpo"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "rewards"})
    source: ClassVar[str] = "Adler et al. 2024 (Nemotron-4), arXiv 2406.11704; NVIDIA/NeMo-Aligner"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        reward_w, reward_l = sides(ops, scores, scores.given("reward"))
        x, known = self.beta * self.difference(ops, scores), self.eta * (reward_w - reward_l)
        if self.form == "squared":
            return (x - known) ** 2
        return _kl(ops, known, x) if self.form == "backward_kl" else _kl(ops, x, known)


@dataclass(frozen=True)
class MODPO(PairLoss):
    """Multi-objective DPO: the preference labels are one goal among several, the others come as rewards.

        L = -log s(r(y_w) - r(y_l))              form = sigmoid
        L = max(0, 1 - (r(y_w) - r(y_l)))        form = hinge,          r(y) = (beta * g(y) - R(y)) / label_weight

    R = sum_k w_k r_k is the total reward of the objective's other goals with their weights; label_weight in (0, 1] is that of the preference
    labels. beta > 0 as in DPO. One value per pair, [P].
    """

    beta: float = option(0.1, above=0)
    label_weight: float = option(0.5, above=0, most=1)
    form: str = option("sigmoid", choices=("sigmoid", "hinge"))

    name: ClassVar[str] = "modpo"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "rewards"})
    source: ClassVar[str] = "Zhou et al. 2023, arXiv 2310.03708, eq. 9; ZHZisZZ/modpo"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        r_w, r_l = sides(ops, scores, (self.beta * scores.logratio() - scores.given("reward")) / self.label_weight)
        return bradley_terry(ops, r_w - r_l) if self.form == "sigmoid" else ops.relu(1 - (r_w - r_l))


@dataclass(frozen=True)
class QRPO(Loss):
    """Quantile reward policy optimisation: regresses the log-ratio on a reward whose partition function is known, its quantile.

        L(y) = (f - beta * log Z - beta * g(y))^2,     q = share of the prompt's reference rewards that R(y) reaches

    transform = log: f = log max(q, 1 / n), Z = beta / (1 + beta); transform = identity: f = q, log Z = log beta + 1 / beta
    (partition = code, as the authors' repository has it) or log(beta (e^(1 / beta) - 1)) (partition = exact). The n reference rewards
    are those of completions that the reference wrote for this prompt, the row's list "ref_rewards"; R is the total reward of the
    objective's goals. beta > 0. One value per completion, [N].
    """

    beta: float = option(0.1, above=0)
    transform: str = option("log", choices=("log", "identity"))
    partition: str = option("code", choices=("code", "exact"))

    name: ClassVar[str] = "qrpo"
    unit: ClassVar[Unit] = "completion"
    data: ClassVar[Data] = "any"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "rewards", "quantiles"})
    source: ClassVar[str] = "Matrenok et al. 2025, arXiv 2507.08068; CLAIRE-Labo/quantile-reward-policy-optimization"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        q, least = scores.given("quantile"), 1 / scores.given("ref_rewards")
        if self.transform == "log":
            f, log_z = ops.log(ops.where(q < least, least, q)), log(self.beta / (1 + self.beta))
        else:
            f, log_z = q, log(self.beta) + 1 / self.beta
            if self.partition == "exact":
                log_z += log1p(-exp(-1 / self.beta))
        return (f - self.beta * log_z - self.beta * scores.logratio()) ** 2


@dataclass(frozen=True)
class EXOReward(Loss):
    """Efficient exact optimisation on scored completions: the policy's distribution over a prompt's completions should be that of the rewards.

        L = sum_k q_k (log q_k - log p_k)     form = reverse
        L = -sum_k p_k log q_k                form = forward,      q = softmax_k(beta * g(y_k)),  p = softmax_k(R(y_k) / reward_temperature)

    k runs over the completions of one prompt; R is the total reward of the objective's goals. form = forward is the repository's
    dpo-rw. beta > 0, reward_temperature > 0. One value per prompt, [R].
    """

    beta: float = option(0.5, above=0)
    reward_temperature: float = option(0.5, above=0)
    form: str = option("reverse", choices=("reverse", "forward"))

    name: ClassVar[str] = "exo_reward"
    unit: ClassVar[Unit] = "group"
    data: ClassVar[Data] = "scored"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "rewards"})
    source: ClassVar[str] = "Ji et al. 2024, arXiv 2402.00856, eq. 15 (EXO-rw); haozheji/exact-optimization"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        log_q = self._normalised(ops, scores, self.beta * scores.logratio())
        log_p = self._normalised(ops, scores, scores.given("reward") / self.reward_temperature)
        terms = ops.exp(log_q) * (log_q - log_p) if self.form == "reverse" else -ops.exp(log_p) * log_q
        return ops.segment_sum(terms, scores.owner, scores.groups)

    def _normalised(self, ops: Ops, scores: Scores, x: Array) -> Array:
        return x - ops.take(ops.segment_logsumexp(x, scores.owner, scores.groups), scores.owner)


def _kl(ops: Ops, a: Array, b: Array) -> Array:
    """KL divergence of a coin with log-odds b from one with log-odds a."""
    return ops.sigmoid(a) * (ops.log_sigmoid(a) - ops.log_sigmoid(b)) + ops.sigmoid(-a) * (ops.log_sigmoid(-a) - ops.log_sigmoid(-b))
