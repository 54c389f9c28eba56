"""Losses whose strength adapts to the pair or to the step, and those of several references, in mpmath. Imports nothing of the library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpmath import exp as mp_exp
from mpmath import log as mp_log
from mpmath import mpf, sqrt
from oracle.inputs import Step
from oracle.pairwise import cross_entropy
from oracle.tape import CAP, log, log_sigmoid, mean, plain, sigmoid

Values = list[Any]
TINY = "1e-6"  # added inside the authors' logarithms


def ada_dpo(
    step: Step,
    beta: float = 1.0,
    rho: float = 0.1,
    tau_min: float = 0.1,
    tau_max: float = 5.0,
    newton_steps: int = 5,
    penalty: str = "linear",
) -> Values:
    """Hong et al. 2024, eq. 6-8 and the authors' code: each pair's temperature tau by Newton's method, a constant for the gradient."""
    values = []
    for w, l in step.pairs:
        u = mpf(beta) * step.margin(w, l)
        tau = temperature(plain(u), mpf(rho), mpf(tau_min), mpf(tau_max), newton_steps, penalty)
        values.append(-tau * log(sigmoid(u / tau) + mpf(TINY)))
    return values


def temperature(u: Any, rho: Any, low: Any, high: Any, steps: int, penalty: str) -> Any:
    """argmin of -tau log s(u / tau) + (rho - log 2) tau, or with rho tau^2; `steps` clipped Newton steps from 1."""
    tau = mpf(1)
    for _ in range(steps):
        p = 1 / (1 + mp_exp(-u / tau))
        q = 1 / (1 + mp_exp(u / tau))
        slope = -mp_log(2 * p + mpf(TINY)) + q * u / tau + (rho if penalty == "linear" else 2 * rho * tau)
        curvature = max(u**2 / tau**3 * p * q, mpf(TINY)) + (0 if penalty == "linear" else 2 * rho)
        tau = min(max(tau - slope / curvature, low), high)
    return tau


def wpo(step: Step, beta: float = 0.01, clamp: str = "one") -> Values:
    """Zhou et al. 2024: DPO weighted by how likely the policy is to write the pair; the weight is a constant."""

    def exponent(i: int) -> Any:
        return (plain(step.logp[i]) - step.collision[i]) / step.length[i]

    limit = 0 if clamp == "one" else CAP
    return [mp_exp(min(exponent(w) + exponent(l), mpf(limit))) * -log_sigmoid(mpf(beta) * step.margin(w, l)) for w, l in step.pairs]


def advance_alpha_dpo(step: Step) -> dict[str, Any]:
    """Running mean and unbiased standard deviation of m, decay 0.9 from 0; `steps` and `spread_steps` count what went into them."""
    before = step.state.get("alpha_dpo", {})
    old = {name: before.get(name, mpf(0)) for name in ("mean", "deviation", "steps", "spread_steps")}
    m = [alignment(step, w, l) for w, l in step.pairs]
    if not m:
        return old
    keep, take = mpf(9) / 10, mpf(1) / 10
    new = {**old, "steps": old["steps"] + 1, "mean": keep * old["mean"] + take * mean(m)}
    if len(m) > 1:
        deviation = sqrt(sum((x - mean(m)) ** 2 for x in m) / (len(m) - 1))
        new |= {"deviation": keep * old["deviation"] + take * deviation, "spread_steps": old["spread_steps"] + 1}
    return new


def alignment(step: Step, w: int, l: int) -> Any:
    """m: how much further than the reference the policy prefers the chosen completion, per token; a constant."""
    return plain(step.ap(w)) - plain(step.ap(l)) - step.ar(w) + step.ar(l)


def alpha_dpo(
    step: Step, beta: float = 2.5, gamma: float = 0.3, alpha: float = 0.05, form: str = "paper", label_smoothing: float = 0.0
) -> Values:
    """Wu et al. 2024, eq. 12; z-scores by running statistics, without a correction in the first step."""
    state = advance_alpha_dpo(step)
    values = []
    for w, l in step.pairs:
        gap, z = step.ap(w) - step.ap(l), z_score(alignment(step, w, l), state, form)
        target = mpf(gamma) + mpf(alpha) * z
        values.append(cross_entropy(mpf(beta) * gap - target if form == "paper" else mpf(beta) * (gap - target), label_smoothing))
    return values


def z_score(m: Any, state: Mapping[str, Any], form: str) -> Any:
    if state["steps"] == 1:
        return mpf(0)
    centre, spread = state["mean"], state["deviation"]
    if form == "paper":  # the authors' averages start at 0; the paper's are those of all data, so the start is corrected for
        centre = centre / (1 - mpf("0.9") ** state["steps"])
        spread = spread / (1 - mpf("0.9") ** state["spread_steps"]) if state["spread_steps"] else mpf(0)
    return (m - centre) / max(spread, mpf("1e-3"))


def mrpo(step: Step, beta: float = 0.1, eta: float = 0.1, pairing: str = "code") -> Values:
    """Le et al. 2024: one virtual reference, the harmonic mean of several; reference 0 is the base, the others are clipped to it."""
    return [log_sigmoid(mpf(beta) * (step.logp[w] - step.logp[l] - blend(step, w, l, mpf(eta), pairing))) * -1 for w, l in step.pairs]


def blend(step: Step, w: int, l: int, eta: Any, pairing: str) -> Any:
    """lrtilde_w - lrtilde_l."""
    refs = [(lr[w], lr[l]) for lr in step.ref_logps]
    confidence = [abs(rw - rl) for rw, rl in refs]
    share = [c / (sum(confidence) + mpf(TINY)) for c in confidence]
    share[0] = 1 - sum(share[1:])
    bw, bl = (abs(sum(r[side] for r in refs) / len(refs)) for side in (0, 1))
    q = bw / (bw + bl) if bw + bl else mpf(1) / 2

    def virtual(side: int, slack: Any) -> Any:
        base = refs[0][side]
        clipped = [base] + [min(max(r[side], base * (1 + slack)), base * (1 - slack)) for r in refs[1:]]
        paired = clipped if pairing == "paper" else clipped[::-1]  # as coded, a reference's confidence weighs the other's 1 / pi
        return -mp_log(sum(a * mp_exp(-lr) for a, lr in zip(share, paired, strict=True)))

    return virtual(0, eta * q) - virtual(1, eta * (1 - q))
