"""DPO with the log-ratios changed before they meet the sigmoid, in mpmath, from the papers. Imports nothing of the library."""

from __future__ import annotations

from typing import Any

from mpmath import mpf
from oracle.inputs import Step
from oracle.tape import at_least, capped_exp, log_sigmoid, sigmoid, total

Values = list[Any]


def f_dpo(step: Step, beta: float = 0.1, divergence: str = "reverse_kl", alpha: float = 0.5) -> Values:
    """Wang et al. 2023, table 1: F(g) = f'(e^g) without its constants; the exponentials are capped at e^80."""
    a = mpf(alpha) - 1
    transform = {
        "reverse_kl": lambda g: g,
        "forward_kl": lambda g: -capped_exp(-g),
        "js": log_sigmoid,
        "alpha": lambda g: capped_exp(a * g) / a if a else g,
    }[divergence]
    return [-log_sigmoid(mpf(beta) * (transform(step.g(w)) - transform(step.g(l)))) for w, l in step.pairs]


def dpo_norm(step: Step, beta: float = 0.1) -> Values:
    """Lambert et al. 2024 (Tulu 3): length-normalised DPO."""
    return [-log_sigmoid(mpf(beta) * (step.g(w) / step.length[w] - step.g(l) / step.length[l])) for w, l in step.pairs]


def ld_dpo(step: Step, beta: float = 0.1, alpha: float = 0.5, reference: str = "both") -> Values:
    """Liu et al. 2024: tokens beyond the length of the shorter completion count alpha."""

    def split(i: int, name: str, shared: int) -> Any:
        logps = step.tokens(i, name)
        return total(logps[:shared]) + mpf(alpha) * total(logps[shared:])

    values = []
    for w, l in step.pairs:
        shared = int(min(step.length[w], step.length[l]))
        policy = split(w, "token_logp", shared) - split(l, "token_logp", shared)
        if reference == "both":
            ref = split(w, "ref_token_logp", shared) - split(l, "ref_token_logp", shared)
        else:
            ref = step.ref_logp[w] - step.ref_logp[l]
        values.append(-log_sigmoid(mpf(beta) * (policy - ref)))
    return values


def dpop(step: Step, beta: float = 0.1, penalty: float = 0.1) -> Values:
    """Pal et al. 2024 (Smaug), eq. 3: the chosen completion may not fall below the reference; slope 0 at equality."""
    fall = lambda w: at_least(step.ref_logp[w] - step.logp[w], 0)  # noqa: E731
    return [-log_sigmoid(mpf(beta) * (step.margin(w, l) - mpf(penalty) * fall(w))) for w, l in step.pairs]


def minor_dpo(step: Step, beta: float = 0.1) -> Values:
    """MinorDPO: a rejected completion below the reference is pushed no further."""
    return [-log_sigmoid(mpf(beta) * (step.g(w) - at_least(step.g(l), 0))) for w, l in step.pairs]


def cal_dpo(step: Step, beta: float = 0.1) -> Values:
    """Xiao et al. 2024: an unscaled DPO term, and log-ratios calibrated to +-1 / (2 beta)."""
    c = 1 / (2 * mpf(beta))
    return [-log_sigmoid(step.margin(w, l)) + (step.g(w) - c) ** 2 + (step.g(l) + c) ** 2 for w, l in step.pairs]


def bapo(step: Step, beta: float = 0.1, penalty: float = 1.0, form: str = "outside") -> Values:
    """BAPO-style: the anchor completion may not fall below the reference; the penalty is added, or lowers the margin."""
    values = []
    for (w, l), anchor, ref in zip(step.pairs, step.anchor_logp, step.anchor_ref_logp, strict=True):
        x, fall = mpf(beta) * step.margin(w, l), mpf(penalty) * at_least(ref - anchor, 0)
        values.append(-log_sigmoid(x) + fall if form == "outside" else -log_sigmoid(x - fall))
    return values


def nemo_rpo(step: Step, beta: float = 0.2, eta: float = 1.0, form: str = "backward_kl") -> Values:
    """NeMo-Aligner's reward-aware losses: x = beta D meets the scaled difference of the true rewards G."""
    values = []
    for w, l in step.pairs:
        x, gap = mpf(beta) * step.margin(w, l), mpf(eta) * (step.reward[w] - step.reward[l])
        values.append((x - gap) ** 2 if form == "squared" else kl(gap, x) if form == "backward_kl" else kl(x, gap))
    return values


def kl(a: Any, b: Any) -> Any:
    """KL of two coins with logits a and b."""
    return total([sigmoid(s * a) * (log_sigmoid(s * a) - log_sigmoid(s * b)) for s in (1, -1)])


def modpo(step: Step, beta: float = 0.1, label_weight: float = 0.5, form: str = "sigmoid") -> Values:
    """Zhou et al. 2023, eq. 11: R = sum_k w_k r_k of the other objectives is what a completion has already earned."""
    r = lambda i: (mpf(beta) * step.g(i) - step.reward[i]) / mpf(label_weight)  # noqa: E731
    gaps = [r(w) - r(l) for w, l in step.pairs]
    return [-log_sigmoid(gap) if form == "sigmoid" else at_least(1 - gap, 0) for gap in gaps]
