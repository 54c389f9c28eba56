"""A rich vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from upo.losses.options import option
from upo.rewards.base import Answer, Card, TextScorer
from upo.rewards.english import words


@dataclass(frozen=True)
class Diversity(TextScorer):
    """Diversity of words: different words per word, averaged over all windows of `window` words, so that length does not count (MATTR).

    An answer shorter than the window is one window, and looks richer than a long one. Fewer than three words score 0.
    Source: Covington and McFall 2010, "Cutting the Gordian knot: the moving-average type-token ratio".
    """

    window: int = option(50, least=3)

    name: ClassVar[str] = "diversity"
    version: ClassVar[str] = "1"
    card: ClassVar[Card] = Card(
        measures="Vocabulary used per window of words. Pulls against plain language; says nothing about sense.",
        range=(0.0, 1.0),
        higher="more different words",
        speed="fast: a formula",
        licence="our own code (Apache-2.0)",
        offline="yes",
    )

    def __call__(self, answers: Sequence[Answer]) -> Sequence[float]:
        return [self._one([word.lower() for word in words(answer.text)]) for answer in answers]

    def _one(self, found: list[str]) -> float:
        if len(found) < 3:
            return 0.0
        size = min(self.window, len(found))
        inside: dict[str, int] = {}
        total = 0
        for i, word in enumerate(found):
            inside[word] = inside.get(word, 0) + 1
            if i >= size:
                gone = found[i - size]
                inside[gone] -= 1
                if not inside[gone]:
                    del inside[gone]
            if i >= size - 1:
                total += len(inside)
        return total / (size * (len(found) - size + 1))
