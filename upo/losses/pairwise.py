"""Losses on the margin between a chosen and a rejected completion."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import ClassVar

from upo.losses.base import Data, Loss, Scores, Unit, bradley_terry, chosen_nll, sides
from upo.losses.options import option
from upo.ops import Array, Ops


@dataclass(frozen=True)
class PairLoss(Loss):
    """A loss with one value per pair, [P], on the log-ratios g(y) = log pi(y|x) - log ref(y|x), summed over tokens."""

    unit: ClassVar[Unit] = "pair"
    data: ClassVar[Data] = "pairs"
    needs: ClassVar[frozenset[str]] = frozenset({"reference"})

    def difference(self, ops: Ops, scores: Scores) -> Array:
        """D = g(y_w) - g(y_l), [P]."""
        g_w, g_l = sides(ops, scores, scores.logratio())
        return g_w - g_l


@dataclass(frozen=True)
class DPO(PairLoss):
    """Direct preference optimisation: the policy's log-ratio of the chosen completion should exceed that of the rejected one.

        L = -(1 - e) log s(beta * D) - e log s(-beta * D),     D = g(y_w) - g(y_l),     g(y) = log pi(y|x) - log ref(y|x)

    g is summed over tokens, s is the sigmoid; beta > 0 is the strength of the tie to the reference; e = label_smoothing in [0, 0.5) is
    the assumed share of flipped labels (cDPO). One value per pair, [P].

    Elsewhere: TRL >= 1.0 ignores label smoothing in its sigmoid loss; OpenRLHF, HALOs and TRL 0.x have this form.
    """

    beta: float = option(0.1, above=0)
    label_smoothing: float = option(0.0, least=0, below=0.5)

    name: ClassVar[str] = "dpo"
    source: ClassVar[str] = "Rafailov et al. 2023, arXiv 2305.18290, eq. 7; label smoothing: Mitchell 2023, A note on DPO with noisy preferences (cDPO)"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        return bradley_terry(ops, self.beta * self.difference(ops, scores), self.label_smoothing)


@dataclass(frozen=True)
class Robust(PairLoss):
    """Robust DPO: an unbiased estimate of the DPO loss without noise, where a known share of the labels is flipped.

        L = (-(1 - e) log s(beta * D) + e log s(-beta * D)) / (1 - 2 e),     D = g(y_w) - g(y_l)

    e = label_smoothing in [0, 0.5) is the share of flipped labels; beta as in DPO. Unlike cDPO the second term is added with the opposite
    sign, so the loss can be negative. One value per pair, [P].
    """

    beta: float = option(0.1, above=0)
    label_smoothing: float = option(0.1, least=0, below=0.5)

    name: ClassVar[str] = "robust"
    source: ClassVar[str] = "Chowdhury et al. 2024, arXiv 2403.00409 (rDPO), as in TRL"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        z, e = self.beta * self.difference(ops, scores), self.label_smoothing
        return (-(1 - e) * ops.log_sigmoid(z) + e * ops.log_sigmoid(-z)) / (1 - 2 * e)


@dataclass(frozen=True)
class IPO(PairLoss):
    """Identity preference optimisation: the margin should be 1 / (2 beta), neither less nor more, so certain labels cannot drive it to infinity.

        L = (h - 1 / (2 beta))^2

    average = token_mean: h = g(y_w) / |y_w| - g(y_l) / |y_l|; average = sum: h = g(y_w) - g(y_l). beta is the paper's tau. One value per
    pair, [P].

    Elsewhere: TRL (after asking the authors), HALOs and LLaMA-Factory take the mean over tokens; the paper's eq. 17 and OpenRLHF the sum.
    """

    beta: float = option(0.1, above=0)
    average: str = option("token_mean", choices=("token_mean", "sum"))

    name: ClassVar[str] = "ipo"
    source: ClassVar[str] = "Azar et al. 2023, arXiv 2310.12036, eq. 17"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        g = scores.logratio()
        h_w, h_l = sides(ops, scores, g / scores.length if self.average == "token_mean" else g)
        return (h_w - h_l - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class Hinge(PairLoss):
    """Hinge loss on the DPO margin: no gradient once a pair is ordered with room to spare.

        L = max(0, 1 - beta * D),     D = g(y_w) - g(y_l)

    beta > 0 is the inverse of the margin wanted. The slope at the kink is 0. One value per pair, [P]. The reference-free form with a
    likelihood term is `slic`.
    """

    beta: float = option(0.1, above=0)

    name: ClassVar[str] = "hinge"
    source: ClassVar[str] = "Liu et al. 2023 (RSO), arXiv 2309.06657, hinge-norm; Zhao et al. 2023 (SLiC-HF), arXiv 2305.10425"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        return ops.relu(1 - self.beta * self.difference(ops, scores))


@dataclass(frozen=True)
class RosePO(PairLoss):
    """RosePO-style personalised smoothing: cDPO with a flip probability of its own for every pair.

        L = -(1 - e_i) log s(beta * D_i) - e_i log s(-beta * D_i)

    e_i is read from the numeric column that `epsilon` names (its value for the chosen completion), between 0 and 1; where it comes from (in the paper
    a preference oracle) is the data's affair. beta as in DPO. One value per pair, [P]. Reconstructed from descriptions of the paper.
    """

    beta: float = option(0.1, above=0)
    epsilon: str = option("epsilon")

    name: ClassVar[str] = "rosepo"
    source: ClassVar[str] = "after Liao et al. 2024 (RosePO), arXiv 2410.12519"

    def columns(self) -> tuple[str, ...]:
        return (self.epsilon,)

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        z, e = self.beta * self.difference(ops, scores), ops.take(scores.column(self.epsilon), scores.chosen)
        return -(1 - e) * ops.log_sigmoid(z) - e * ops.log_sigmoid(-z)


@dataclass(frozen=True)
class ODPO(PairLoss):
    """DPO with an offset: how much better the chosen completion is says how large its margin has to be.

        L = -log s(beta * D_i - m_i)

    m_i is read from the numeric column that `margin` names (its value for the chosen completion), e.g. the logarithm of a difference of scores. beta as in
    DPO. One value per pair, [P].
    """

    beta: float = option(0.1, above=0)
    margin: str = option("margin")

    name: ClassVar[str] = "odpo"
    source: ClassVar[str] = "Amini et al. 2024, arXiv 2402.10571, eq. 8"

    def columns(self) -> tuple[str, ...]:
        return (self.margin,)

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        offset = ops.take(scores.column(self.margin), scores.chosen)
        return -ops.log_sigmoid(self.beta * self.difference(ops, scores) - offset)


@dataclass(frozen=True)
class RPO(PairLoss):
    """DPO with a likelihood term on the chosen completion, which keeps its probability from falling along with the rejected one's.

        L = -log s(beta * D) + alpha * NLL(y_w)

    nll = sequence: the mean over the completion's tokens; nll = token: all chosen tokens of the step weigh alike. alpha >= 0 is the
    weight of the term; beta as in DPO. One value per pair, [P].

    Elsewhere: TRL's rpo_alpha takes the mean over tokens; LLaMA-Factory (pref_ftx) over each sequence. Usual alpha: 1 (iterative RPO),
    0.005 (regularised PO, arXiv 2405.16436).
    """

    beta: float = option(0.1, above=0)
    alpha: float = option(1.0, least=0)
    nll: str = option("sequence", choices=("sequence", "token"))

    name: ClassVar[str] = "rpo"
    source: ClassVar[str] = "Pang et al. 2024 (iterative RPO), arXiv 2404.19733, eq. 1"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        return bradley_terry(ops, self.beta * self.difference(ops, scores)) + self.alpha * chosen_nll(ops, scores, self.nll)


@dataclass(frozen=True)
class DiscoPOP(PairLoss):
    """Discovered preference optimisation: logistic where the pair is ordered wrongly, exponential where it is ordered rightly.

        L = -(1 - m) log s(x) + m e^-x,     x = beta * D,     m = s(x / temperature)

    The mixing weight m carries a gradient, so the loss is not convex. beta > 0, temperature > 0. Far below 0 the second term is 0: it
    is computed as exp(log m - x). One value per pair, [P].
    """

    beta: float = option(0.05, above=0)
    temperature: float = option(0.05, above=0, below=1)

    name: ClassVar[str] = "discopop"
    source: ClassVar[str] = "Lu et al. 2024, arXiv 2406.08414, eq. 6 (log-ratio modulated loss)"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        x = self.beta * self.difference(ops, scores)
        return -ops.sigmoid(-x / self.temperature) * ops.log_sigmoid(x) + ops.exp(ops.log_sigmoid(x / self.temperature) - x)


@dataclass(frozen=True)
class EXO(PairLoss):
    """Efficient exact optimisation: the reverse KL divergence of the pair's implicit preference from the label, smoothed by epsilon.

        L = s(x) (log s(x) - log p_w) + s(-x) (log s(-x) - log p_l),     x = beta * D

    target = normalized: p_w = 1 - epsilon, p_l = epsilon; target = code: p_w = 1, p_l = epsilon, as the authors' repository has it, with
    epsilon = e^-10. epsilon must be in (0, 0.5): at 0 the loss is infinite. beta as in DPO. One value per pair, [P].

    Elsewhere: TRL 0.x silently puts 1e-3 for an epsilon of 0.
    """

    beta: float = option(0.1, above=0)
    epsilon: float = option(1e-3, above=0, below=0.5)
    target: str = option("normalized", choices=("normalized", "code"))

    name: ClassVar[str] = "exo"
    source: ClassVar[str] = "Ji et al. 2024, arXiv 2402.00856, eq. 16 (EXO-pref)"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        x = self.beta * self.difference(ops, scores)
        log_w = log(1 - self.epsilon) if self.target == "normalized" else 0.0
        return ops.sigmoid(x) * (ops.log_sigmoid(x) - log_w) + ops.sigmoid(-x) * (ops.log_sigmoid(-x) - log(self.epsilon))
