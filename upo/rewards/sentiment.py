"""Friendly or hostile wording."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any, ClassVar

from upo.errors import UpoError
from upo.rewards.base import Answer, Card, TextScorer


@dataclass(frozen=True)
class Sentiment(TextScorer):
    """Sentiment by VADER's lexicon and rules: its compound score, from -1 (hostile) to 1 (friendly).

    The sum of the words' valences, with rules for negation, emphasis and capitals, squashed: s / sqrt(s^2 + 15). It is made for sentences,
    and near -1 or 1 for many long answers; `normalise: quantile` spreads them.
    Source: Hutto and Gilbert 2014, "VADER: a parsimonious rule-based model for sentiment analysis of social media text". English only.
    """

    name: ClassVar[str] = "sentiment"
    version: ClassVar[str] = "1"
    card: ClassVar[Card] = Card(
        measures="Friendly wording. Does not know irony, and takes the mention of bad things for bad words.",
        range=(-1.0, 1.0),
        higher="friendlier",
        speed="fast: a lexicon and rules",
        licence="vaderSentiment: MIT",
        offline="yes: the lexicon comes with the package",
    )

    def check(self) -> None:
        _ = self._analyser

    def identity(self) -> str:
        return f"{super().identity()} vaderSentiment {version('vaderSentiment')}"

    def __call__(self, answers: Sequence[Answer]) -> Sequence[float]:
        return [float(self._analyser.polarity_scores(answer.text)["compound"]) for answer in answers]

    @cached_property
    def _analyser(self) -> Any:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError:
            raise UpoError('scorer sentiment: vaderSentiment is not installed. Install it with: pip install "upo[rewards]"') from None
        return SentimentIntensityAnalyzer()
