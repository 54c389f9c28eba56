"""Losses of a pair that are a function of D, in mpmath, from the papers. Imports nothing of the library.

Each function gives one value per pair. gw, gl: log-ratios of chosen and rejected; D = gw - gl; x = beta D.
"""

from __future__ import annotations

from typing import Any

from mpmath import mpf
from oracle.inputs import Step
from oracle.tape import at_least, exp, log, log_sigmoid, sigmoid

Values = list[Any]


def cross_entropy(x: Any, flipped: Any) -> Any:
    """Of a Bradley-Terry model with logit x, where a share of the labels is flipped."""
    return -(1 - mpf(flipped)) * log_sigmoid(x) - mpf(flipped) * log_sigmoid(-x)


def margins(step: Step, beta: float) -> Values:
    return [mpf(beta) * step.margin(w, l) for w, l in step.pairs]


def dpo(step: Step, beta: float = 0.1, label_smoothing: float = 0.0) -> Values:
    """Rafailov et al. 2023, eq. 7; smoothing: Mitchell 2023 (cDPO)."""
    return [cross_entropy(x, label_smoothing) for x in margins(step, beta)]


def robust(step: Step, beta: float = 0.1, label_smoothing: float = 0.1) -> Values:
    """Chowdhury et al. 2024: unbiased under flips with probability e."""
    e = mpf(label_smoothing)
    return [(-(1 - e) * log_sigmoid(x) + e * log_sigmoid(-x)) / (1 - 2 * e) for x in margins(step, beta)]


def ipo(step: Step, beta: float = 0.1, average: str = "token_mean") -> Values:
    """Azar et al. 2023, eq. 17; over sums, or over means per token as the authors told TRL."""
    target = 1 / (2 * mpf(beta))
    if average == "sum":
        return [(step.margin(w, l) - target) ** 2 for w, l in step.pairs]
    return [(step.g(w) / step.length[w] - step.g(l) / step.length[l] - target) ** 2 for w, l in step.pairs]


def hinge(step: Step, beta: float = 0.1) -> Values:
    """Liu et al. 2023 (RSO), hinge-norm; at the kink the slope is 0."""
    return [at_least(1 - x, 0) for x in margins(step, beta)]


def rosepo(step: Step, beta: float = 0.1, epsilon: str = "epsilon") -> Values:
    """RosePO: cDPO with a smoothing of each pair's own."""
    return [cross_entropy(mpf(beta) * step.margin(w, l), step.columns[epsilon][w]) for w, l in step.pairs]


def odpo(step: Step, beta: float = 0.1, margin: str = "margin") -> Values:
    """Amini et al. 2024: DPO with an offset."""
    return [-log_sigmoid(mpf(beta) * step.margin(w, l) - step.columns[margin][w]) for w, l in step.pairs]


def rpo(step: Step, beta: float = 0.1, alpha: float = 1.0, nll: str = "sequence") -> Values:
    """Pang et al. 2024: DPO plus alpha times the chosen completion's NLL."""
    return [-log_sigmoid(mpf(beta) * step.margin(w, l)) + mpf(alpha) * step.nll(w, nll) for w, l in step.pairs]


def discopop(step: Step, beta: float = 0.05, temperature: float = 0.05) -> Values:
    """Lu et al. 2024, eq. 5: a gate, with its gradient, between the logistic and the exponential loss."""
    values = []
    for x in margins(step, beta):
        gate = sigmoid(x / mpf(temperature))
        values.append((1 - gate) * -log_sigmoid(x) + gate * exp(-x))
    return values


def exo(step: Step, beta: float = 0.1, epsilon: float = 1e-3, target: str = "normalized") -> Values:
    """Ji et al. 2024, eq. 16: KL(q || p), q = (s(x), s(-x)); p = (1 - e, e), or as coded (1, e), which is no distribution."""
    e = mpf(epsilon)
    log_p = log(1 - e) if target == "normalized" else mpf(0)
    return [sigmoid(x) * (log_sigmoid(x) - log_p) + sigmoid(-x) * (log_sigmoid(-x) - log(e)) for x in margins(step, beta)]


def nca(step: Step, beta: float = 0.01) -> Values:
    """Chen et al. 2024, pair form."""
    half = 1 / mpf(2)
    rows = [(mpf(beta) * step.g(w), mpf(beta) * step.g(l)) for w, l in step.pairs]
    return [-log_sigmoid(rw) - half * log_sigmoid(-rw) - half * log_sigmoid(-rl) for rw, rl in rows]


def bco_pair(step: Step, beta: float = 0.1) -> Values:
    """Jung et al. 2024, eq. 8 with delta = 0."""
    return [-log_sigmoid(mpf(beta) * step.g(w)) - log_sigmoid(-mpf(beta) * step.g(l)) for w, l in step.pairs]


def apo_zero(step: Step, beta: float = 0.1) -> Values:
    """D'Oosterlinck et al. 2024, eq. 7."""
    return [1 - sigmoid(mpf(beta) * step.g(w)) + sigmoid(mpf(beta) * step.g(l)) for w, l in step.pairs]


def apo_down(step: Step, beta: float = 0.1) -> Values:
    """D'Oosterlinck et al. 2024, eq. 8."""
    return [sigmoid(mpf(beta) * step.g(w)) + 1 - sigmoid(mpf(beta) * step.margin(w, l)) for w, l in step.pairs]


def sppo(step: Step, beta: float = 0.001, targets: str = "hard", win_probability: str = "win_probability") -> Values:
    """Wu et al. 2024, eq. 4.7, with the official code's 1/2; hard: the chosen wins surely, the rejected loses surely."""
    values = []
    for w, l in step.pairs:
        pw, pl = (mpf(1), mpf(0)) if targets == "hard" else (step.columns[win_probability][w], step.columns[win_probability][l])
        first, second = ((step.g(i) - (p - mpf("0.5")) / mpf(beta)) ** 2 for i, p in ((w, pw), (l, pl)))
        values.append((first + second) / 2)
    return values
