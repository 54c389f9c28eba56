"""DPO on log-ratios that are reshaped first: another divergence, another notion of length, one side held back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from upo.losses.base import Scores, beyond_rounding, bradley_terry, capped_exp, sides
from upo.losses.options import option
from upo.losses.pairwise import PairLoss
from upo.ops import Array, Ops


@dataclass(frozen=True)
class FDPO(PairLoss):
    """DPO under another f-divergence between policy and reference than the reverse KL.

        L = -log s(beta * (F(y_w) - F(y_l))),     F = f'(pi / ref), constants dropped

    divergence = reverse_kl: F = g (DPO itself); forward_kl: F = -e^-g; js (Jensen-Shannon): F = log s(g); alpha:
    F = e^((a - 1) g) / (a - 1) with a = alpha >= 0, which is reverse_kl at 1 and forward_kl at 0. Exponents are capped at 80. g is
    summed over tokens, beta > 0 as in DPO. One value per pair, [P].

    Elsewhere: TRL 0.x writes 1 - a for a.
    """

    beta: float = option(0.1, above=0)
    divergence: str = option("reverse_kl", choices=("reverse_kl", "forward_kl", "js", "alpha"))
    alpha: float = option(0.5, least=0)

    name: ClassVar[str] = "f_dpo"
    source: ClassVar[str] = "Wang et al. 2023, arXiv 2309.16240, theorem 1 and table 1"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        f_w, f_l = sides(ops, scores, self._derivative(ops, scores.logratio()))
        return bradley_terry(ops, self.beta * (f_w - f_l))

    def _derivative(self, ops: Ops, g: Array) -> Array:
        if self.divergence == "js":
            return ops.log_sigmoid(g)
        power = {"reverse_kl": 1.0, "forward_kl": 0.0, "alpha": self.alpha}[self.divergence] - 1
        return g if power == 0 else capped_exp(ops, power * g) / power


@dataclass(frozen=True)
class DPONorm(PairLoss):
    """Length-normalised DPO: log-ratios per token, so that a long completion has no larger margin by its length alone.

        L = -log s(beta * (g(y_w) / |y_w| - g(y_l) / |y_l|))

    beta > 0 is larger than in DPO by about the length of a completion (Tulu 3 uses 5). One value per pair, [P]. TRL: sigmoid_norm.
    """

    beta: float = option(0.1, above=0)

    name: ClassVar[str] = "dpo_norm"
    source: ClassVar[str] = "Lambert et al. 2024 (Tulu 3), arXiv 2411.15124, length-normalised DPO"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        r_w, r_l = sides(ops, scores, self.implicit_reward(scores))
        return bradley_terry(ops, r_w - r_l)

    def implicit_reward(self, scores: Scores) -> Array:
        return self.beta * scores.logratio() / scores.length


@dataclass(frozen=True)
class LDDPO(PairLoss):
    """Length-desensitised DPO: tokens beyond the length that both completions have count for less.

        L = -log s(beta * D~),     log pi~(y) = sum_(t <= m) log pi(y_t) + alpha * sum_(t > m) log pi(y_t),     m = min(|y_w|, |y_l|)

    D~ is D with log pi~ in place of log pi. alpha in [0, 1]: 1 is DPO, 0 ignores the tail. reference = both: the reference's log-probs
    are weighted alike; reference = policy: they stay plain. beta > 0 as in DPO. One value per pair, [P].

    Elsewhere: TRL >= 1.0 has `both`, TRL 0.x and LLaMA-Factory have `policy`.
    """

    beta: float = option(0.1, above=0)
    alpha: float = option(0.5, least=0, most=1)
    reference: str = option("both", choices=("both", "policy"))

    name: ClassVar[str] = "ld_dpo"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "tokens"})
    source: ClassVar[str] = "Liu et al. 2024, arXiv 2409.06411, eq. 9"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        n, owner = len(scores.length), scores.given("token_owner")
        length_w, length_l = sides(ops, scores, scores.length)
        shorter = length_l - ops.relu(length_l - length_w)
        common = ops.segment_sum(shorter, scores.chosen, n) + ops.segment_sum(shorter, scores.rejected, n)
        index = scores.given("token_index")
        weight = ops.where(index < ops.take(common, owner), 0.0 * index + 1.0, self.alpha)
        logp = ops.segment_sum(weight * scores.given("token_logp"), owner, n)
        if self.reference == "both":
            ref = ops.segment_sum(weight * scores.given("ref_token_logp"), owner, n)
        else:
            ref = scores.given("ref_logp")
        g_w, g_l = sides(ops, scores, logp - ref)
        return bradley_terry(ops, self.beta * (g_w - g_l))


@dataclass(frozen=True)
class DPOP(PairLoss):
    """DPO-positive (Smaug): a penalty where the chosen completion becomes less likely than under the reference.

        L = -log s(beta * (D - penalty * max(0, log ref(y_w) - log pi(y_w))))

    penalty >= 0 is the paper's lambda; 0 is DPO. beta > 0 as in DPO. A fall of less than 0.001 nats counts as none, as rounding explains
    it. One value per pair, [P].

    Elsewhere: turbo-alignment has 0.1; the paper's own penalty is far larger, as its log-probs are.
    """

    beta: float = option(0.1, above=0)
    penalty: float = option(0.1, least=0)

    name: ClassVar[str] = "dpop"
    source: ClassVar[str] = "Pal et al. 2024 (Smaug), arXiv 2402.13228, eq. 3"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        g_w, g_l = sides(ops, scores, scores.logratio())
        return bradley_terry(ops, self.beta * (g_w - g_l - self.penalty * beyond_rounding(ops, -g_w)))


@dataclass(frozen=True)
class MinorDPO(PairLoss):
    """Minor DPO: a rejected completion is pushed down only until it is as likely as under the reference.

        L = -log s(beta * (g(y_w) - max(0, g(y_l))))

    beta > 0 as in DPO. At g(y_l) = 0, where training starts, the slope for the rejected side is 0; less than 0.001 nats counts as 0, as
    rounding explains it. One value per pair, [P].
    """

    beta: float = option(0.1, above=0)

    name: ClassVar[str] = "minor_dpo"
    source: ClassVar[str] = "Xie et al. 2024, arXiv 2408.09834"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        g_w, g_l = sides(ops, scores, scores.logratio())
        return bradley_terry(ops, self.beta * (g_w - beyond_rounding(ops, g_l)))
