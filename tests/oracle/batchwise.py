"""Losses that compare a pair with the other pairs of its step, in mpmath, from the papers. Imports nothing of the library."""

from __future__ import annotations

from typing import Any

from mpmath import exp as mp_exp
from mpmath import mpf
from oracle.inputs import Step
from oracle.pairwise import cross_entropy
from oracle.tape import log_sigmoid, mean, plain

Values = list[Any]


def aot(step: Step, beta: float = 0.01, label_smoothing: float = 0.0) -> Values:
    """Melnyk et al. 2024, paired: policy margins against reference margins, each sorted by itself; equal ones keep their order."""
    policy = sorted((step.logp[w] - step.logp[l] for w, l in step.pairs), key=plain)
    reference = sorted(step.ref_logp[w] - step.ref_logp[l] for w, l in step.pairs)
    return [cross_entropy(mpf(beta) * (p - r), label_smoothing) for p, r in zip(policy, reference, strict=True)]


def aot_unpaired(step: Step, beta: float = 0.01, label_smoothing: float = 0.0) -> Values:
    """The same, unpaired: log-ratios of the chosen against those of the rejected."""
    chosen = sorted((step.g(w) for w, _ in step.pairs), key=plain)
    rejected = sorted((step.g(l) for _, l in step.pairs), key=plain)
    return [cross_entropy(mpf(beta) * (w - l), label_smoothing) for w, l in zip(chosen, rejected, strict=True)]


def relative_po(step: Step, beta: float = 0.1, tau: float = 0.5) -> Values:
    """Yin et al. 2024, eq. 10-12: every desirable against every undesirable completion, weighted by how alike their prompts are."""
    values = []
    for row, i in zip(step.distance, step.positive, strict=True):
        closeness = [mp_exp(-c / mpf(tau)) for c in row]
        weights = [c / sum(closeness) for c in closeness]
        values.append(mean([-log_sigmoid(mpf(beta) * a * (step.g(i) - step.g(j))) for a, j in zip(weights, step.negative, strict=True)]))
    return values


def relative_po_diagonal(step: Step, beta: float = 0.1, diagonal: float = 0.8) -> Values:
    """The authors' variant without embeddings: a pair's own contrast, and the mean of those with the other pairs' rejected."""
    values = []
    for p, (w, l) in enumerate(step.pairs):
        own = -log_sigmoid(mpf(beta) * step.margin(w, l))
        others = [-log_sigmoid(mpf(beta) * step.margin(w, other)) for k, (_, other) in enumerate(step.pairs) if k != p]
        values.append(mpf(diagonal) * own + (1 - mpf(diagonal)) * mean(others) if others else own)
    return values
