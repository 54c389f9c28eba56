"""Offline reinforcement learning on rewarded completions, in mpmath, from papers and authors' code. Imports nothing of the library."""

from __future__ import annotations

from typing import Any

from mpmath import mpf, sqrt
from oracle.inputs import Step
from oracle.tape import CAP, at_least, at_most, capped_exp, mean, plain, total

Values = list[Any]


def advantage(step: Step, i: int) -> Any:
    """max(0, R - V), a constant."""
    return max(step.reward[i] - plain(step.value[i]), mpf(0))


def clipped_ratio(gap: Any, clip: float) -> Any:
    """pi / ref within 1 +- clip, a constant."""
    ratio = plain(capped_exp(min(plain(gap), mpf(CAP))))
    return min(max(ratio, 1 - mpf(clip)), 1 + mpf(clip))


def a_lol(step: Step, clip: float = 0.9, form: str = "full", kl_weight: float = 0.1) -> Values:
    """Baheti et al. 2024, eq. 4 and its variants: likelihood weighted by a positive advantage and the importance ratio."""
    values = []
    for i in step.all():
        ratio = clipped_ratio(step.g(i), clip) if form == "full" else 1
        value = -advantage(step, i) * ratio * step.logp[i]
        values.append(value + mpf(kl_weight) * step.g(i) if form == "kl" else value)
    return values


def a_lol_sequence(step: Step, clip: float = 0.9) -> Values:
    """The variant with a ratio per token."""
    values = []
    for i in step.all():
        rows = zip(step.tokens(i, "token_logp"), step.tokens(i, "ref_token_logp"), strict=True)
        values.append(total([-advantage(step, i) * clipped_ratio(lp - lr, clip) * lp for lp, lr in rows]))
    return values


def dro_v(step: Step, tau: float = 1.0, form: str = "joint") -> Values:
    """Richemond et al. 2024: squared residual of R = V + tau g; or the policy's part over tau and the value's, each with its own gradient."""
    values, t = [], mpf(tau)
    for i in step.all():
        reward, value, g = step.reward[i], step.value[i], step.g(i)
        if form == "joint":
            values.append((reward - value - t * g) ** 2 / 2)
        else:
            policy = -(step.logp[i] * (reward - plain(value)) - t / 2 * g**2)
            values.append(policy + (value - (reward - t * plain(g))) ** 2 / 2)
    return values


def offline_ppo(
    step: Step,
    discount: float = 0.99,
    trace: float = 0.95,
    clip: float = 0.5,
    value_coef: float = 0.01,
    kl_coef: float = 0.1,
    form: str = "legacy",
) -> Values:
    """HALOs' offline PPO, branches `legacy` and `main`; one value per token of the step."""
    legacy, gamma, c = form == "legacy", mpf(discount), mpf(clip)
    rows = [episode(step, i, gamma, mpf(trace), legacy) for i in step.all()]
    advantages = [a for row, _ in rows for a in row]
    centre = mean(advantages)
    spread = sqrt(mean([(a - centre) ** 2 for a in advantages]) + mpf("1e-8"))
    low, high = (c, 1 / c) if legacy else (1 - c, 1 + c)
    values = []
    for i, (row, returns) in zip(step.all(), rows, strict=True):
        scores = zip(step.tokens(i, "token_logp"), step.tokens(i, "ref_token_logp"), step.tokens(i, "token_value"), strict=True)
        for (lp, lr, v), a, target in zip(scores, row, returns, strict=True):
            a = (a - centre) / spread
            ratio = capped_exp(lp - lr)
            free, held = -a * ratio, -a * at_least(at_most(ratio, high), low)
            policy = held if plain(held) > plain(free) else free  # at a tie the free one: the first step, where policy = reference
            kl = lr - lp if legacy else lp - lr
            values.append(policy + mpf(value_coef) * (v - target) ** 2 / 2 + mpf(kl_coef) * kl)
    return values


def episode(step: Step, i: int, gamma: Any, trace: Any, legacy: bool) -> tuple[list[Any], list[Any]]:
    """Generalised advantages and returns of one completion, whose reward comes with its last token; constants.

    `legacy` returns are those from the next token on: `discounted_future_rewards` of HALOs is read before the token's own reward enters.
    """
    value = [plain(v) for v in step.tokens(i, "token_value")]
    reward = [mpf(0)] * (len(value) - 1) + [step.reward[i]]
    advantages, returns = [], []
    following_advantage = following_value = following_return = mpf(0)
    for r, v in zip(reversed(reward), reversed(value), strict=True):
        following_advantage = r + gamma * following_value - v + gamma * trace * following_advantage
        here = r + gamma * following_return
        returns.append(following_return if legacy else here)
        following_return, following_value = here, v
        advantages.append(following_advantage)
    return advantages[::-1], returns[::-1]
