"""Preference losses without a reference: on likelihoods per token, most with a likelihood term of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from upo.losses.base import Data, Loss, Scores, Unit, bradley_terry, chosen_nll, sides
from upo.losses.options import option
from upo.ops import Array, Ops

CERTAIN = -1e-6  # log-odds are infinite at probability 1: mean log-probs above this count as this


@dataclass(frozen=True)
class ReferenceFree(Loss):
    """A loss with one value per pair, [P], that needs no reference. a(y) = log pi(y|x) / |y|."""

    unit: ClassVar[Unit] = "pair"
    data: ClassVar[Data] = "pairs"

    def implicit_reward(self, scores: Scores) -> Array:
        return getattr(self, "beta", 1.0) * scores.mean_logp()


@dataclass(frozen=True)
class SimPO(ReferenceFree):
    """Simple preference optimisation: the mean log-prob per token is the reward, with a target margin.

        L = -(1 - e) log s(z) - e log s(-z),     z = beta * (a(y_w) - a(y_l) - gamma_beta_ratio),     a(y) = log pi(y|x) / |y|

    beta > 0; gamma_beta_ratio >= 0 is the target margin gamma over beta; e = label_smoothing in [0, 0.5). One value per pair, [P].

    Elsewhere: TRL's simpo_gamma is gamma itself (0.5 at beta 2 is a ratio of 0.25), and its CPO trainer adds a likelihood term unless
    cpo_alpha is 0 (here: cpo_simpo). Published settings: beta 2-10, ratio 0.1-0.8.
    """

    beta: float = option(2.0, above=0)
    gamma_beta_ratio: float = option(0.25, least=0)
    label_smoothing: float = option(0.0, least=0, below=0.5)

    name: ClassVar[str] = "simpo"
    source: ClassVar[str] = "Meng et al. 2024, arXiv 2405.14734, eq. 6; princeton-nlp/SimPO"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        a_w, a_l = sides(ops, scores, scores.mean_logp())
        return bradley_terry(ops, self.beta * (a_w - a_l - self.gamma_beta_ratio), self.label_smoothing)


@dataclass(frozen=True)
class CPO(ReferenceFree):
    """Contrastive preference optimisation: DPO with a uniform reference, and a likelihood term on the chosen completion.

        L = -log s(beta * (log pi(y_w) - log pi(y_l))) + alpha * NLL(y_w)

    The log-probs are summed over tokens. nll = token: all chosen tokens of the step weigh alike; nll = sequence: the mean over each
    completion's tokens first. beta > 0, alpha >= 0. One value per pair, [P].

    Elsewhere: the present code of the authors' repository is ARPO (X-ALMA), another loss.
    """

    beta: float = option(0.1, above=0)
    alpha: float = option(1.0, least=0)
    nll: str = option("token", choices=("token", "sequence"))

    name: ClassVar[str] = "cpo"
    source: ClassVar[str] = "Xu et al. 2024, arXiv 2401.08417, eq. 5, as in TRL"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        w, l = sides(ops, scores, scores.logp)
        return bradley_terry(ops, self.beta * (w - l)) + self.alpha * chosen_nll(ops, scores, self.nll)

    def implicit_reward(self, scores: Scores) -> Array:
        return self.beta * scores.logp


@dataclass(frozen=True)
class CPOSimPO(ReferenceFree):
    """SimPO with the likelihood term of CPO.

        L = -log s(beta * (a(y_w) - a(y_l) - gamma_beta_ratio)) + alpha * NLL(y_w),     a(y) = log pi(y|x) / |y|

    Options as in `simpo` and `cpo`: beta > 0, gamma_beta_ratio >= 0, alpha >= 0, nll = token or sequence. One value per pair, [P].
    """

    beta: float = option(2.0, above=0)
    gamma_beta_ratio: float = option(0.25, least=0)
    alpha: float = option(1.0, least=0)
    nll: str = option("token", choices=("token", "sequence"))

    name: ClassVar[str] = "cpo_simpo"
    source: ClassVar[str] = "fe1ixxu/CPO_SIMPO; Meng et al. 2024, arXiv 2405.14734, and Xu et al. 2024, arXiv 2401.08417"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        preference = SimPO(self.beta, self.gamma_beta_ratio)(ops, scores)
        return preference + self.alpha * chosen_nll(ops, scores, self.nll)


@dataclass(frozen=True)
class ORPO(ReferenceFree):
    """Odds-ratio preference optimisation: likelihood of the chosen completion, and a penalty on the odds of the rejected one.

        L = NLL(y_w) - odds_weight * log s(o(y_w) - o(y_l)),     o(y) = a(y) - log(1 - e^a(y)),     a(y) = log pi(y|x) / |y|

    odds_weight >= 0 is the paper's lambda. nll = sequence: the mean over the completion's tokens; nll = token: all chosen tokens of the step
    weigh alike. A mean log-prob above -1e-6 counts as -1e-6 in o. One value per pair, [P].

    Elsewhere: the authors' code and TRL count the prompt's tokens in the likelihood too; here only completions have log-probs, as in
    LLaMA-Factory.
    """

    odds_weight: float = option(0.1, least=0)
    nll: str = option("sequence", choices=("sequence", "token"))

    name: ClassVar[str] = "orpo"
    source: ClassVar[str] = "Hong et al. 2024, arXiv 2403.07691, eq. 6-7"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        o_w, o_l = sides(ops, scores, _log_odds(ops, scores.mean_logp()))
        return chosen_nll(ops, scores, self.nll) + self.odds_weight * bradley_terry(ops, o_w - o_l)


@dataclass(frozen=True)
class ASFT(ReferenceFree):
    """Aligned supervised fine-tuning: likelihood of the chosen completion, and the absolute odds of both.

        L = nll_weight * NLL(y_w) + odds_weight * (-log s(beta * o(y_w)) - log s(-beta * o(y_l)))

    o(y) = a(y) - log(1 - e^a(y)), a(y) = log pi(y|x) / |y|, NLL(y) = -a(y); a mean log-prob above -1e-6 counts as -1e-6 in o. beta > 0,
    odds_weight >= 0, nll_weight >= 0. One value per pair, [P].
    """

    beta: float = option(1.0, above=0)
    odds_weight: float = option(1.0, least=0)
    nll_weight: float = option(1.0, least=0)

    name: ClassVar[str] = "asft"
    source: ClassVar[str] = "Wang et al. 2024, arXiv 2409.10571, as in turbo-alignment"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        o_w, o_l = sides(ops, scores, _log_odds(ops, scores.mean_logp()))
        judged = bradley_terry(ops, self.beta * o_w) + bradley_terry(ops, -self.beta * o_l)
        return self.nll_weight * chosen_nll(ops, scores, "sequence") + self.odds_weight * judged


@dataclass(frozen=True)
class SLiC(ReferenceFree):
    """Sequence likelihood calibration: a hinge on log-probs, and the likelihood of the chosen completion to hold the model in place.

        L = max(0, delta - (log pi(y_w) - log pi(y_l))) - nll_weight * log pi(y_w)

    The log-probs are summed over tokens; delta is the margin wanted, nll_weight >= 0 the paper's lambda. The slope at the kink is 0. One
    value per pair, [P].

    Elsewhere: HALOs (branch legacy) has this form.
    """

    delta: float = option(1.0)
    nll_weight: float = option(0.1, least=0)

    name: ClassVar[str] = "slic"
    source: ClassVar[str] = "Zhao et al. 2023 (SLiC-HF), arXiv 2305.10425, eq. 1"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        w, l = sides(ops, scores, scores.logp)
        return ops.relu(self.delta - (w - l)) - self.nll_weight * w

    def implicit_reward(self, scores: Scores) -> Array:
        return scores.logp


def _log_odds(ops: Ops, a: Array) -> Array:
    a = ops.where(a > CERTAIN, CERTAIN, a)
    return a - ops.log1mexp(a)
