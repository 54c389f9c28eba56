"""Losses of single completions and of scored groups, in mpmath, from the papers. Imports nothing of the library."""

from __future__ import annotations

from typing import Any

from mpmath import log as mp_log
from mpmath import mpf
from oracle.inputs import Step
from oracle.tape import exp, log_sigmoid, log_softmax, mean, plain, sigmoid, total

Values = list[Any]


def sft(step: Step) -> Values:
    """Negative log-likelihood per token of every desirable completion."""
    return [-step.ap(i) for i in step.positive]


def csft(step: Step) -> Values:
    """Negative log-likelihood per token of every completion, desirable or not."""
    return [-step.ap(i) for i in step.all()]


def kto(step: Step, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Values:
    """Ethayarajh et al. 2024, eq. 7: lambda_y - v(x, y); z0 is the mean log-ratio of mismatched completions, not below 0."""
    z0 = max(mean(step.partner_logratio), mpf(0))
    values = []
    for i in step.all():
        sign, scale = (1, mpf(desirable_weight)) if step.label[i] > 0 else (-1, mpf(undesirable_weight))
        values.append(scale - scale * sigmoid(sign * mpf(beta) * (step.g(i) - z0)))
    return values


def apo_zero_unpaired(step: Step, beta: float = 0.1) -> Values:
    """D'Oosterlinck et al. 2024, eq. 7, a completion at a time."""
    rewards = [sigmoid(mpf(beta) * step.g(i)) for i in step.all()]
    return [1 - r if label > 0 else r for r, label in zip(rewards, step.label, strict=True)]


def advance_bco(step: Step, beta: float) -> dict[str, Any]:
    """Sum and number of all rewards so far, this step's included."""
    before = step.state.get("bco", {})
    rewards = [mpf(beta) * plain(step.g(i)) for i in step.all() if step.label[i]]
    return {"sum": before.get("sum", mpf(0)) + sum(rewards), "count": before.get("count", mpf(0)) + len(rewards)}


def bco(step: Step, beta: float = 0.1) -> Values:
    """Jung et al. 2024, eq. 9: delta is the running mean of all rewards, a constant."""
    state = advance_bco(step, beta)
    delta = state["sum"] / state["count"]
    return [-log_sigmoid((1 if step.label[i] > 0 else -1) * (mpf(beta) * step.g(i) - delta)) for i in step.all()]


def qrpo(step: Step, beta: float = 0.1, transform: str = "log", partition: str = "code") -> Values:
    """Matrenok et al. 2025: a regression of beta g on the quantile of the reward among those of the reference's completions.

    Z = E_u exp(f(u) / beta) over u uniform in [0, 1]: beta (e^(1 / beta) - 1) for f = u, of which the code drops the -1, and
    beta / (1 + beta) for f = log u.
    """
    b = mpf(beta)
    values = []
    for i in step.all():
        q = step.quantile[i]
        if transform == "log":
            target = mp_log(max(q, 1 / step.ref_rewards[i])) - b * mp_log(b / (1 + b))
        else:
            target = q - b * (mp_log(b * (mp_exp(1 / b) - 1)) if partition == "exact" else mp_log(b) + 1 / b)
        values.append((target - b * step.g(i)) ** 2)
    return values


def mp_exp(x: Any) -> Any:
    return plain(exp(x))


def exo_reward(step: Step, beta: float = 0.5, reward_temperature: float = 0.5, form: str = "reverse") -> Values:
    """Ji et al. 2024, eq. 14 (reverse) and the authors' dpo-rw (forward), over the completions of a prompt."""
    values = []
    for prompt in sorted(set(step.owner)):
        members = [i for i in step.all() if step.owner[i] == prompt]
        log_q = log_softmax([mpf(beta) * step.g(i) for i in members])
        log_p = [plain(x) for x in log_softmax([step.reward[i] / mpf(reward_temperature) for i in members])]
        if form == "reverse":
            values.append(total([exp(q) * (q - p) for q, p in zip(log_q, log_p, strict=True)]))
        else:
            values.append(total([-mp_exp(p) * q for q, p in zip(log_q, log_p, strict=True)]))
    return values
