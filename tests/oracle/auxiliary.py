"""UPO's auxiliary terms of one completion, in mpmath, from the paper (2405.17956, ICLR 2025 submission). Imports nothing of the library.

What the paper detaches is an argument of its own here, so that a derivative by an argument is the gradient that trains it.
"""

from __future__ import annotations

from typing import Any

from mpmath import exp, mpf
from oracle.tape import mean, plain

Number = Any


def weight(reward: Number, value: Number, temperature: Number) -> Number:
    """exp(lambda * A) with A = R - V(x); eq. 27."""
    return exp(temperature * (reward - value))


def actor(lp: Number, length: Number, weight: Number) -> Number:
    """The listing's advantage-weighted likelihood: the mean log-prob of a token, times a constant weight."""
    return -weight * (lp / length)


def expectile(reward: Number, value: Number, tau: Number) -> Number:
    """Eq. 12 with L_2^tau(u) = |tau - 1(u < 0)| u^2 of Kostrikov et al. 2021."""
    u = reward - value
    return abs(tau - (1 if plain(u) < 0 else 0)) * u**2


def upo(preference: Number, actors: list[Number], values: list[Number], gamma: Number, coefficient: Number) -> Number:
    """The listing's total: preference loss + gamma * mean actor + c_v * mean value loss over all scored completions."""
    return preference + mpf(gamma) * mean(actors) + mpf(coefficient) * mean(values)
