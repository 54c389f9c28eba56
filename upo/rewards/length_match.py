"""Answers as long as the preferred one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from upo.errors import DataError
from upo.rewards.base import Answer, Card, TextScorer
from upo.rewards.english import words


@dataclass(frozen=True)
class LengthMatch(TextScorer):
    """How close an answer's length comes to that of the row's chosen one, in words.

        min(n, m) / max(n, m),  n words here and m in the chosen answer

    1 for the chosen answer itself. Needs rows with one chosen answer: pairs, or groups in which one completion is labelled good.
    """

    name: ClassVar[str] = "length_match"
    version: ClassVar[str] = "1"
    card: ClassVar[Card] = Card(
        measures="Length relative to the chosen answer, in words. The chosen answer scores 1, so it agrees with the preference by construction.",
        range=(0.0, 1.0),
        higher="closer in length",
        speed="fast: a formula",
        licence="our own code (Apache-2.0)",
        offline="yes",
    )
    reads: ClassVar[tuple[str, ...]] = ("text", "chosen")

    def __call__(self, answers: Sequence[Answer]) -> Sequence[float]:
        scores = []
        for answer in answers:
            if answer.chosen is None:
                raise DataError(f"{answer.origin}: scorer length_match needs one chosen answer in each row. Use scorer length, or pairs.")
            n, m = sorted((len(words(answer.text)), len(words(answer.chosen))))
            scores.append(n / m if m else 1.0)
        return scores
