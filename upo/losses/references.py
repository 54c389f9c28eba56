"""Losses with more to compare against than one reference: several references, or an anchor completion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from upo.losses.base import Scores, beyond_rounding, bradley_terry, sides
from upo.losses.options import option
from upo.losses.pairwise import PairLoss
from upo.ops import Array, Ops

NOTHING = -1e9  # stands for log 0


@dataclass(frozen=True)
class MRPO(PairLoss):
    """Multi-reference preference optimisation: DPO against a blend of references, each weighted by how clearly it ranks the pair.

        L = -log s(beta * [(log pi(y_w) - lr~(y_w)) - (log pi(y_l) - lr~(y_l))])
        lr~(y) = -log sum_k alpha_k / ref_k(y)
        alpha_k = |a_k| / (sum_j |a_j| + 1e-6) for k > 0,     alpha_0 = 1 - the rest,     a_k = log ref_k(y_w) - log ref_k(y_l)

    Reference 0 is the first in the configuration, the base of the others (`reference: [base, other/adapter]`). The others are first
    clipped to it: log ref_k(y) to between (1 + eta_y) and (1 - eta_y) times log ref_0(y), with eta_w = eta q, eta_l = eta (1 - q),
    q = |b_w| / (|b_w| + |b_l|), b the means of log ref over the references. eta in (0, 1), beta > 0. One value per pair, [P].

    pairing = code is the authors' repository, for two references: there each alpha multiplies the other reference's 1 / ref;
    pairing = paper is the sum as written above, for any number.
    """

    beta: float = option(0.1, above=0)
    eta: float = option(0.1, above=0, below=1)
    pairing: str = option("code", choices=("code", "paper"))

    name: ClassVar[str] = "mrpo"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "references"})
    source: ClassVar[str] = "Le et al. 2024, arXiv 2405.16388; thaihungle/MRPO"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        refs = scores.given("ref_logps")
        pairs = [sides(ops, scores, refs[k]) for k in range(refs.shape[0])]
        self.check_run(len(pairs), 1)
        alphas = self._weights(ops, pairs)
        if self.pairing == "code":
            alphas = alphas[::-1]
        w, l = sides(ops, scores, scores.logp)
        blend_w, blend_l = (self._blend(ops, alphas, clipped) for clipped in self._clipped(ops, pairs))
        return bradley_terry(ops, self.beta * ((w - blend_w) - (l - blend_l)))

    def check_run(self, references: int, batch_size: int) -> None:
        if references < 2:
            raise ValueError("reference: mrpo compares several references; give a list, e.g. [base, path/to/adapter]")
        if self.pairing == "code" and references > 2:
            raise ValueError(f"objective.preference: mrpo with pairing: code is for two references, and there are {references}; use pairing: paper")

    def _weights(self, ops: Ops, pairs: list[tuple[Array, Array]]) -> list[Array]:
        certain = [_absolute(ops, w - l) for w, l in pairs]
        total = sum(certain) + 1e-6
        return [(certain[0] + 1e-6) / total, *(c / total for c in certain[1:])]  # the base has the rest

    def _clipped(self, ops: Ops, pairs: list[tuple[Array, Array]]) -> tuple[list[Array], list[Array]]:
        """The references' log-probs of chosen and rejected completions, all but the first clipped to it."""
        b_w, b_l = (_absolute(ops, sum(side)) for side in zip(*pairs, strict=True))
        total = b_w + b_l
        q = ops.where(total > 0, b_w / ops.where(total > 0, total, 1.0), 0.5)

        def clip(values: list[Array], eta: Array) -> list[Array]:
            low, high = values[0] * (1 + eta), values[0] * (1 - eta)
            raised = [ops.where(x < low, low, x) for x in values[1:]]
            return [values[0], *(ops.where(x > high, high, x) for x in raised)]

        return clip([w for w, _ in pairs], self.eta * q), clip([l for _, l in pairs], self.eta * (1 - q))

    def _blend(self, ops: Ops, alphas: list[Array], logps: list[Array]) -> Array:
        """-log sum_k alpha_k e^-logp_k; a reference of weight 0 drops out."""
        terms = []
        for alpha, logp in zip(alphas, logps, strict=True):
            absent = alpha <= 0
            terms.append(ops.where(absent, NOTHING, ops.log(ops.where(absent, 1.0, alpha)) - logp))
        top = terms[0]
        for term in terms[1:]:
            top = ops.where(term > top, term, top)
        return -(top + ops.log(sum(ops.exp(term - top) for term in terms)))


@dataclass(frozen=True)
class BAPO(PairLoss):
    """BAPO-style base-anchored DPO: what the base model would have answered must not become less likely.

        L = -log s(beta * D) + penalty * max(0, log ref(y_b) - log pi(y_b))              form = outside
        L = -log s(beta * D - penalty * max(0, log ref(y_b) - log pi(y_b)))              form = inside

    y_b is the row's "anchor", an answer of the base model to the same prompt. penalty >= 0; beta > 0 as in DPO. A fall of less than 0.001
    nats counts as none, as rounding explains it. The paper's own formula
    could not be checked: both forms follow its description. One value per pair, [P].
    """

    beta: float = option(0.1, above=0)
    penalty: float = option(1.0, least=0)
    form: str = option("outside", choices=("outside", "inside"))

    name: ClassVar[str] = "bapo"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "anchors"})
    source: ClassVar[str] = "after Lee et al. 2024 (BAPO), arXiv 2407.00693"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        lost = self.penalty * beyond_rounding(ops, scores.given("anchor_ref_logp") - scores.given("anchor_logp"))
        z = self.beta * self.difference(ops, scores)
        return bradley_terry(ops, z) + lost if self.form == "outside" else bradley_terry(ops, z - lost)


def _absolute(ops: Ops, x: Array) -> Array:
    return ops.relu(x) + ops.relu(-x)
