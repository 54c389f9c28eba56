"""Preference losses of one example, in mpmath, from the papers. Independent of the library: it imports nothing of it.

lp, lr: summed log-probs of a completion under the policy and under the reference; w chosen, l rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpmath import exp, log, mpf

Number = Any


def sigmoid(x: Number) -> Number:
    return 1 / (1 + exp(-x))


def dpo(lp_w: Number, lp_l: Number, lr_w: Number, lr_l: Number, beta: Number, epsilon: Number = 0) -> Number:
    """Rafailov et al. 2023, eq. 7, with the label flipped with probability epsilon (cDPO): cross-entropy of a Bradley-Terry model.

    The preference has probability p = (pi_w / ref_w)^beta / ((pi_w / ref_w)^beta + (pi_l / ref_l)^beta).
    """
    p_w = 1 / (1 + exp(beta * (lp_l - lr_l) - beta * (lp_w - lr_w)))
    p_l = 1 / (1 + exp(beta * (lp_w - lr_w) - beta * (lp_l - lr_l)))
    return -(1 - epsilon) * log(p_w) - epsilon * log(p_l)


def reference_point(partners: Sequence[Number]) -> Number:
    """z0 of Ethayarajh et al. 2024: the mean log-ratio of mismatched completions, not below 0."""
    mean = sum(partners, mpf(0)) / len(partners)
    return mean if mean > 0 else mpf(0)


def kto(lp: Number, lr: Number, desirable: bool, z0: Number, beta: Number, weight_d: Number = 1, weight_u: Number = 1) -> Number:
    """Ethayarajh et al. 2024, eq. 7: lambda_y - v(x, y)."""
    r = lp - lr
    if desirable:
        return weight_d - weight_d * sigmoid(beta * (r - z0))
    return weight_u - weight_u * sigmoid(beta * (z0 - r))


def sft(lp: Number, length: Number) -> Number:
    """Negative log-likelihood per token."""
    return -lp / length
