"""Losses of a pair without a reference, in mpmath, from the papers. Imports nothing of the library."""

from __future__ import annotations

from typing import Any

from mpmath import mpf
from oracle.inputs import Step
from oracle.pairwise import cross_entropy
from oracle.tape import at_least, at_most, exp, log, log_sigmoid

Values = list[Any]
CERTAIN = "-1e-6"  # the odds of a completion of probability 1 are infinite: its mean log-prob counts as this at most


def simpo(step: Step, beta: float = 2.0, gamma_beta_ratio: float = 0.25, label_smoothing: float = 0.0) -> Values:
    """Meng et al. 2024, eq. 6, with gamma = beta * gamma_beta_ratio."""
    return [cross_entropy(mpf(beta) * (step.ap(w) - step.ap(l) - mpf(gamma_beta_ratio)), label_smoothing) for w, l in step.pairs]


def cpo(step: Step, beta: float = 0.1, alpha: float = 1.0, nll: str = "token") -> Values:
    """Xu et al. 2024, eq. 3 and 5: sums in the preference term, plus alpha times the chosen completion's NLL."""
    return [-log_sigmoid(mpf(beta) * (step.logp[w] - step.logp[l])) + mpf(alpha) * step.nll(w, nll) for w, l in step.pairs]


def cpo_simpo(step: Step, beta: float = 2.0, gamma_beta_ratio: float = 0.25, alpha: float = 1.0, nll: str = "token") -> Values:
    """SimPO's preference term with CPO's NLL."""
    return [value + mpf(alpha) * step.nll(w, nll) for value, (w, _) in zip(simpo(step, beta, gamma_beta_ratio), step.pairs, strict=True)]


def log_odds(step: Step, i: int) -> Any:
    """log p / (1 - p) of p = e^ap."""
    p = exp(at_most(step.ap(i), CERTAIN))
    return log(p / (1 - p))


def orpo(step: Step, odds_weight: float = 0.1, nll: str = "sequence") -> Values:
    """Hong et al. 2024, eq. 6-7."""
    return [step.nll(w, nll) - mpf(odds_weight) * log_sigmoid(log_odds(step, w) - log_odds(step, l)) for w, l in step.pairs]


def asft(step: Step, beta: float = 1.0, odds_weight: float = 1.0, nll_weight: float = 1.0) -> Values:
    """Wang et al. 2024: absolute odds of both completions."""
    values = []
    for w, l in step.pairs:
        good, bad = -log_sigmoid(mpf(beta) * log_odds(step, w)), -log_sigmoid(-mpf(beta) * log_odds(step, l))
        values.append(-mpf(nll_weight) * step.ap(w) + mpf(odds_weight) * (good + bad))
    return values


def slic(step: Step, delta: float = 1.0, nll_weight: float = 0.1) -> Values:
    """Zhao et al. 2023 (SLiC-HF), eq. 3, on sums; slope 0 at the kink."""
    return [at_least(mpf(delta) - (step.logp[w] - step.logp[l]), 0) - mpf(nll_weight) * step.logp[w] for w, l in step.pairs]
