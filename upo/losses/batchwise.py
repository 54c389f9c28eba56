"""Losses that compare across the pairs of an optimizer step: by rank, or each chosen completion with every rejected one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from upo.losses.base import Data, Loss, Scores, Unit, bradley_terry, sides
from upo.losses.options import option
from upo.losses.pairwise import PairLoss
from upo.ops import Array, Ops


@dataclass(frozen=True)
class AOT(PairLoss):
    """Alignment by optimal transport, paired: the policy's margins, sorted, should exceed the reference's margins, sorted.

        L = -(1 - e) log s(beta * z_i) - e log s(-beta * z_i)
        z = sort(log pi(y_w) - log pi(y_l)) - sort(log ref(y_w) - log ref(y_l))

    Both sorts run over the pairs of the whole optimizer step, each on its own; the gradient follows the permutation, ties keep their
    order. e = label_smoothing in [0, 0.5); beta > 0. With one pair it is DPO. One value per pair, [P].

    Elsewhere: TRL sorts within the batch of a device.
    """

    beta: float = option(0.01, above=0)
    label_smoothing: float = option(0.0, least=0, below=0.5)

    name: ClassVar[str] = "aot"
    coupled: ClassVar[bool] = True
    source: ClassVar[str] = "Melnyk et al. 2024, arXiv 2406.05882, paired"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        w, l = sides(ops, scores, scores.logp)
        ref_w, ref_l = sides(ops, scores, scores.given("ref_logp"))
        return bradley_terry(ops, self.beta * (_sorted(ops, w - l) - _sorted(ops, ref_w - ref_l)), self.label_smoothing)


@dataclass(frozen=True)
class AOTUnpaired(PairLoss):
    """Alignment by optimal transport, unpaired: the log-ratios of the chosen completions, sorted, should exceed those of the rejected, sorted.

        L = -(1 - e) log s(beta * z_i) - e log s(-beta * z_i),     z = sort(g(y_w)) - sort(g(y_l))

    Both sorts run over the whole optimizer step, each on its own; the gradient follows the permutation, ties keep their order. Which
    chosen belongs to which rejected completion does not matter, but there must be as many of both, so rows are pairs. e =
    label_smoothing in [0, 0.5); beta > 0. One value per pair, [P].
    """

    beta: float = option(0.01, above=0)
    label_smoothing: float = option(0.0, least=0, below=0.5)

    name: ClassVar[str] = "aot_unpaired"
    coupled: ClassVar[bool] = True
    source: ClassVar[str] = "Melnyk et al. 2024, arXiv 2406.05882, unpaired"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        g_w, g_l = sides(ops, scores, scores.logratio())
        return bradley_terry(ops, self.beta * (_sorted(ops, g_w) - _sorted(ops, g_l)), self.label_smoothing)


@dataclass(frozen=True)
class RelativePO(Loss):
    """Relative preference optimisation: every desirable completion against every undesirable one, the more the closer their prompts.

        L_i = mean over j of -log s(beta * W_ij * (g(y_i) - g(y_j))),     W_ij = softmax over j of -c_ij / tau

    i runs over the chosen or desirable completions of the optimizer step, j over the rejected or undesirable ones; c is the cosine distance of
    their prompts, here of the model's own hidden states at the last prompt token under the reference, after subtracting their mean over
    the training rows. tau > 0, beta > 0. One value per desirable completion, [C]; 0 in a step without undesirable ones.

    Elsewhere: the authors use all-MiniLM-L6-v2 sentence embeddings (tau 0.5 for pairs, 0.75 for unpaired data) and the batch of a device.
    """

    beta: float = option(0.1, above=0)
    tau: float = option(0.5, above=0)

    name: ClassVar[str] = "relative_po"
    unit: ClassVar[Unit] = "chosen"
    data: ClassVar[Data] = "labels"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "distance"})
    coupled: ClassVar[bool] = True
    source: ClassVar[str] = "Yin et al. 2024, arXiv 2402.10958, eq. 10-12"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        difference = _across(ops, scores.logratio(), scores.positive, scores.negative)
        if 0 in difference.shape:
            return 0.0 * ops.take(scores.logp, scores.positive)
        closeness = -scores.given("distance") / self.tau
        weight = ops.exp(closeness - ops.logsumexp(closeness, axis=1)[:, None])
        return -ops.sum(ops.log_sigmoid(self.beta * weight * difference), axis=1) / difference.shape[1]


@dataclass(frozen=True)
class RelativePODiagonal(PairLoss):
    """Relative preference optimisation without embeddings: a pair's own margin, and those of its chosen against all other rejected completions.

        L_i = d * (-log s(beta * (g(y_w,i) - g(y_l,i)))) + (1 - d) * mean over j != i of -log s(beta * (g(y_w,i) - g(y_l,j)))

    d = diagonal in [0, 1]; i and j run over the pairs of the optimizer step; with one pair it is DPO. beta > 0. One value per pair, [P].
    """

    beta: float = option(0.1, above=0)
    diagonal: float = option(0.8, least=0, most=1)

    name: ClassVar[str] = "relative_po_diagonal"
    coupled: ClassVar[bool] = True
    source: ClassVar[str] = "Yin et al. 2024, arXiv 2402.10958, diagonal weighting"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        own = bradley_terry(ops, self.beta * self.difference(ops, scores))
        others = own.shape[0] - 1
        if others < 1:
            return own
        every = bradley_terry(ops, self.beta * _across(ops, scores.logratio(), scores.chosen, scores.rejected))
        return self.diagonal * own + (1 - self.diagonal) * (ops.sum(every, axis=1) - own) / others


def _sorted(ops: Ops, x: Array) -> Array:
    return ops.take(x, ops.argsort_stable(ops.stop_gradient(x)))


def _across(ops: Ops, g: Array, rows: Array, columns: Array) -> Array:
    """[rows, columns] of g_i - g_j."""
    return ops.take(g, rows)[:, None] - ops.take(g, columns)[None, :]
