"""Offline reinforcement learning on scored completions, with a value head: baselines of UPO's paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from upo.losses.base import Data, Loss, Scores, Unit, capped_exp
from upo.losses.options import option
from upo.ops import Array, Ops


@dataclass(frozen=True)
class ALoL(Loss):
    """Advantage leftover lunch: likelihood of completions that are better than expected, weighted by how much.

        L(y) = -A rho log pi(y|x),     A = max(0, R(y) - V(x)),     rho = clip(pi(y|x) / ref(y|x), 1 - clip, 1 + clip)
        L(y) = -A log pi(y|x)                                              form = reference_free
        L(y) = -A log pi(y|x) + kl_weight (log pi(y|x) - log ref(y|x))     form = kl

    The first is form = full. A and rho are constants for the gradient; log pi is summed over tokens; R is the total reward of the objective's goals. V is the
    value head as fitted before the first step, and is not trained on. clip in (0, 1). One value per completion, [N].

    Elsewhere: the authors also drop rows with A = 0 and sample the others in proportion to A.
    """

    clip: float = option(0.9, above=0, below=1)
    form: str = option("full", choices=("full", "reference_free", "kl"))
    kl_weight: float = option(0.1, least=0)

    name: ClassVar[str] = "a_lol"
    unit: ClassVar[Unit] = "completion"
    data: ClassVar[Data] = "any"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "rewards", "value"})
    source: ClassVar[str] = "Baheti et al. 2023, arXiv 2305.14718, eq. 4-6; abaheti95/LoL-RL"

    def requires(self) -> frozenset[str]:
        return self.needs - {"reference"} if self.form == "reference_free" else self.needs

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        loss = -_advantage(ops, scores) * scores.logp
        if self.form == "reference_free":
            return loss
        if self.form == "kl":
            return loss + self.kl_weight * scores.logratio()
        return loss * _clipped(ops, ops.stop_gradient(scores.logratio()), 1 - self.clip, 1 + self.clip)

    def implicit_reward(self, scores: Scores) -> Array:
        return scores.mean_logp() if self.form == "reference_free" else scores.logratio()


@dataclass(frozen=True)
class ALoLSequence(Loss):
    """Advantage leftover lunch with an importance weight for every token.

        L(y) = -A sum_t rho_t log pi(y_t),     A = max(0, R(y) - V(x)),     rho_t = clip(pi(y_t) / ref(y_t), 1 - clip, 1 + clip)

    As `a_lol` otherwise: A and rho are constants for the gradient, clip in (0, 1). One value per completion, [N].
    """

    clip: float = option(0.9, above=0, below=1)

    name: ClassVar[str] = "a_lol_sequence"
    unit: ClassVar[Unit] = "completion"
    data: ClassVar[Data] = "any"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "rewards", "value", "tokens"})
    source: ClassVar[str] = "Baheti et al. 2023, arXiv 2305.14718, A-LoL seq.; abaheti95/LoL-RL"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        logp = scores.given("token_logp")
        rho = _clipped(ops, ops.stop_gradient(logp) - scores.given("ref_token_logp"), 1 - self.clip, 1 + self.clip)
        return -_advantage(ops, scores) * ops.segment_sum(rho * logp, scores.given("token_owner"), len(scores.length))


@dataclass(frozen=True)
class DROV(Loss):
    """Direct reward optimisation with a value function: the log-ratio should explain what the reward is above the value.

        L(y) = (1/2) (R(y) - V(x) - tau * g(y))^2                                                                       form = joint
        L(y) = -(R - V) log pi(y|x) + (tau / 2) g(y)^2 + (1/2) (V(x) - (R - tau * g))^2                                 form = split

    g = log pi(y|x) - log ref(y|x) is summed over tokens; R is the total reward of the objective's goals; tau > 0 is the strength of the
    tie to the reference. In the split form the policy's terms take V as a constant and the value's term takes g as one, which scales the
    policy's gradient by 1 / tau (reconstructed from the paper). One value per completion, [N].
    """

    tau: float = option(1.0, above=0)
    form: str = option("joint", choices=("joint", "split"))

    name: ClassVar[str] = "dro_v"
    unit: ClassVar[Unit] = "completion"
    data: ClassVar[Data] = "any"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "rewards", "value"})
    source: ClassVar[str] = "Richemond et al. 2024, arXiv 2405.19107, eq. 6"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        g, reward, value = scores.logratio(), scores.given("reward"), scores.given("value")
        if self.form == "joint":
            return 0.5 * (reward - value - self.tau * g) ** 2
        policy = -scores.logp * (reward - ops.stop_gradient(value)) + 0.5 * self.tau * g**2
        return policy + 0.5 * (value - (reward - self.tau * ops.stop_gradient(g))) ** 2

    def implicit_reward(self, scores: Scores) -> Array:
        return self.tau * scores.logratio()


@dataclass(frozen=True)
class OfflinePPO(Loss):
    """One-step offline PPO: clipped policy gradient on fixed completions, with the reference as the old policy and a value for every token.

        L_t  = max(-A_t rho_t, -A_t clip(rho_t)) + value_coef * (1/2) (V_t - G_t)^2 + kl_coef * k_t,     rho_t = pi(y_t) / ref(y_t)
        A_t  = sum over l of (discount * trace)^l (r_(t+l) + discount V_(t+l+1) - V_(t+l)),     standardised over the step's tokens

    r is the completion's total reward R on its last token and 0 before; V after the last token is 0. A and G are constants for the
    gradient; exponents are capped at 80; where both terms of the maximum are equal, the first counts.
    form = legacy: clip to [clip, 1 / clip], G_t = the rewards from the next token on, k_t = log ref - log pi; form = main: clip to
    [1 - clip, 1 + clip], G_t includes r_t, k_t = log pi - log ref. discount and trace in (0, 1], clip in (0, 1), value_coef and
    kl_coef >= 0. One value per token, [M].

    Elsewhere: the two forms are those of HALOs' branches; rewards of +1 and -1 there are the goal `label` here.
    """

    discount: float = option(0.99, above=0, most=1)
    trace: float = option(0.95, above=0, most=1)
    clip: float = option(0.5, above=0, below=1)
    value_coef: float = option(0.01, least=0)
    kl_coef: float = option(0.1, least=0)
    form: str = option("legacy", choices=("legacy", "main"))

    name: ClassVar[str] = "offline_ppo"
    unit: ClassVar[Unit] = "token"
    data: ClassVar[Data] = "any"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "rewards", "tokens", "token_values"})
    coupled: ClassVar[bool] = True
    source: ClassVar[str] = "Ethayarajh et al. 2024, arXiv 2402.01306, section 4.1 (offline PPO); ContextualAI/HALOs; Schulman et al. 2017"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        logratio, owner, value = scores.given("token_logp") - scores.given("ref_token_logp"), scores.given("token_owner"), scores.given("token_value")
        more = ops.where(scores.given("token_index") < ops.take(scores.length, owner) - 1.5, 0.0 * logratio + 1.0, 0.0)
        more = ops.stop_gradient(more)  # 1 while another token follows
        reward = (1 - more) * ops.take(scores.given("reward"), owner)
        advantage = self._advantage(ops, reward, ops.stop_gradient(value), more)
        returns = ops.reverse_scan(reward, self.discount * more)
        low, high = (self.clip, 1 / self.clip) if self.form == "legacy" else (1 - self.clip, 1 + self.clip)
        full, kept = -advantage * capped_exp(ops, logratio), -advantage * _clipped(ops, logratio, low, high)
        policy = ops.where(full < kept, kept, full)
        target, drift = ((returns - reward) / self.discount, -logratio) if self.form == "legacy" else (returns, logratio)
        return policy + self.value_coef * 0.5 * (value - target) ** 2 + self.kl_coef * drift

    def implicit_reward(self, scores: Scores) -> Array:
        return scores.logratio()

    def _advantage(self, ops: Ops, reward: Array, value: Array, more: Array) -> Array:
        """Generalised advantage estimates [M], standardised. The later values' part is (S - V) / trace with S their discounted sum."""
        decay = self.discount * self.trace * more
        later = (ops.reverse_scan(value, decay) - value) / self.trace
        estimate = ops.reverse_scan(reward - value, decay) + later
        n = estimate.shape[0]
        deviation = estimate - ops.sum(estimate) / n
        return deviation * ops.exp(-0.5 * ops.log(ops.sum(deviation**2) / n + 1e-8))


def _advantage(ops: Ops, scores: Scores) -> Array:
    """max(0, R - V), constants."""
    return ops.relu(scores.given("reward") - ops.stop_gradient(scores.given("value")))


def _clipped(ops: Ops, logratio: Array, low: float, high: float) -> Array:
    """e^logratio, not below low and not above high; the slope outside is 0."""
    ratio = capped_exp(ops, logratio)
    raised = ops.where(ratio < low, low, ratio)
    return ops.where(raised > high, high, raised)
