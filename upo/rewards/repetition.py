"""Answers that do not go round in circles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from upo.losses.options import option
from upo.rewards.base import Answer, Card, TextScorer
from upo.rewards.english import words


@dataclass(frozen=True)
class Repetition(TextScorer):
    """Freedom from repetition: the share of different ones among the answer's runs of `n` words, upper and lower case alike (distinct-n).

    1 where no run of n words comes twice. Fewer than three words score 0; from three words on, an answer shorter than n repeats nothing.
    Source: Li et al. 2016, "A diversity-promoting objective function for neural conversation models" (distinct-n).
    """

    n: int = option(3, least=1)

    name: ClassVar[str] = "repetition"
    version: ClassVar[str] = "1"
    card: ClassVar[Card] = Card(
        measures="Freedom from repeated phrases within an answer. Long answers repeat more by nature; says nothing across answers.",
        range=(0.0, 1.0),
        higher="less repetition",
        speed="fast: a formula",
        licence="our own code (Apache-2.0)",
        offline="yes",
    )

    def __call__(self, answers: Sequence[Answer]) -> Sequence[float]:
        return [self._one([word.lower() for word in words(answer.text)]) for answer in answers]

    def _one(self, found: list[str]) -> float:
        if len(found) < 3:
            return 0.0
        runs = list(zip(*(found[i:] for i in range(self.n)), strict=False))
        return len(set(runs)) / len(runs) if runs else 1.0
