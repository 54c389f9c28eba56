"""Losses that judge the chosen and the rejected completion each on its own, not their difference alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from upo.losses.base import Scores, bradley_terry, sides
from upo.losses.options import option
from upo.losses.pairwise import PairLoss
from upo.ops import Array, Ops


@dataclass(frozen=True)
class NCA(PairLoss):
    """Noise contrastive alignment: raises the chosen log-ratio, and holds both near 0, so that the chosen likelihood does not fall.

        L = -log s(r_w) - (1/2) log s(-r_w) - (1/2) log s(-r_l),     r = beta * g(y)

    beta > 0 is the strength of the tie to the reference. One value per pair, [P].
    """

    beta: float = option(0.01, above=0)

    name: ClassVar[str] = "nca"
    source: ClassVar[str] = "Chen et al. 2024, arXiv 2402.05369, eq. 12 with K = 2, one completion preferred"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        r_w, r_l = sides(ops, scores, self.beta * scores.logratio())
        return -ops.log_sigmoid(r_w) - 0.5 * ops.log_sigmoid(-r_w) - 0.5 * ops.log_sigmoid(-r_l)


@dataclass(frozen=True)
class BCOPair(PairLoss):
    """Binary classification of pairs: the chosen log-ratio above 0, the rejected one below. The quality term of MPO.

        L = -log s(beta * g(y_w)) - log s(-beta * g(y_l))

    beta > 0 is the strength of the tie to the reference. One value per pair, [P].

    Elsewhere: TRL 0.x subtracts a running mean of rewards from both (here: `bco`); TRL >= 1.0 has this form.
    """

    beta: float = option(0.1, above=0)

    name: ClassVar[str] = "bco_pair"
    source: ClassVar[str] = "Jung et al. 2024, arXiv 2404.04656, without reward shift; in MPO: Wang et al. 2024, arXiv 2411.10442"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        r_w, r_l = sides(ops, scores, self.beta * scores.logratio())
        return bradley_terry(ops, r_w) + bradley_terry(ops, -r_l)


@dataclass(frozen=True)
class APOZero(PairLoss):
    """Anchored preference optimisation, zero: raises the chosen likelihood and lowers the rejected one, each against its own reference.

        L = 1 - s(beta * g(y_w)) + s(beta * g(y_l))

    For data whose chosen completions are better than what the model writes. beta > 0 is the strength of the tie to the reference. One
    value per pair, [P].
    """

    beta: float = option(0.1, above=0)

    name: ClassVar[str] = "apo_zero"
    source: ClassVar[str] = "D'Oosterlinck et al. 2024, arXiv 2408.06266, APO-zero"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        r_w, r_l = sides(ops, scores, self.beta * scores.logratio())
        return ops.sigmoid(-r_w) + ops.sigmoid(r_l)


@dataclass(frozen=True)
class APODown(PairLoss):
    """Anchored preference optimisation, down: lowers the chosen likelihood, and the rejected one by more.

        L = s(beta * g(y_w)) + 1 - s(beta * D),     D = g(y_w) - g(y_l)

    For data whose chosen completions are worse than what the model writes. beta > 0 is the strength of the tie to the reference. One
    value per pair, [P].
    """

    beta: float = option(0.1, above=0)

    name: ClassVar[str] = "apo_down"
    source: ClassVar[str] = "D'Oosterlinck et al. 2024, arXiv 2408.06266, APO-down"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        r_w, r_l = sides(ops, scores, self.beta * scores.logratio())
        return ops.sigmoid(r_w) + ops.sigmoid(-(r_w - r_l))


@dataclass(frozen=True)
class SPPO(PairLoss):
    """Self-play preference optimisation: each log-ratio should be proportional to how often its completion wins against the policy.

        L = (1/2) [(g(y_w) - (P_w - 1/2) / beta)^2 + (g(y_l) - (P_l - 1/2) / beta)^2]

    targets = hard: P_w = 1 and P_l = 0; targets = column: the win probabilities are read from the numeric column that
    `win_probability` names, one for each completion. beta > 0 is the paper's 1 / eta. One value per pair, [P].

    Elsewhere: TRL's sppo_hard lacks the factor 1/2.
    """

    beta: float = option(0.001, above=0)
    targets: str = option("hard", choices=("hard", "column"))
    win_probability: str = option("win_probability")

    name: ClassVar[str] = "sppo"
    source: ClassVar[str] = "Wu et al. 2024, arXiv 2405.00675, eq. 4.5; uclaml/SPPO"

    def columns(self) -> tuple[str, ...]:
        return (self.win_probability,) if self.targets == "column" else ()

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        g_w, g_l = sides(ops, scores, scores.logratio())
        wins = sides(ops, scores, scores.column(self.win_probability)) if self.targets == "column" else (1.0, 0.0)
        return 0.5 * sum((g - (p - 0.5) / self.beta) ** 2 for g, p in zip((g_w, g_l), wins, strict=True))


@dataclass(frozen=True)
class CalDPO(PairLoss):
    """Calibrated DPO: the margin grows, but the log-ratios are held to the scale of a reward of +1/2 and -1/2.

        L = -log s(D) + (g(y_w) - 1 / (2 beta))^2 + (g(y_l) + 1 / (2 beta))^2,     D = g(y_w) - g(y_l)

    beta > 0 enters the calibration alone. One value per pair, [P].
    """

    beta: float = option(0.1, above=0)

    name: ClassVar[str] = "cal_dpo"
    source: ClassVar[str] = "Xiao et al. 2024, arXiv 2412.14516, as in turbo-alignment"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        g_w, g_l = sides(ops, scores, scores.logratio())
        target = 1 / (2 * self.beta)
        return bradley_terry(ops, g_w - g_l) + (g_w - target) ** 2 + (g_l + target) ** 2
