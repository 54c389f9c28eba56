"""Clean language, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar

from upo.errors import UpoError
from upo.rewards.base import Answer, Card, TextScorer


@dataclass(frozen=True)
class Profanity(TextScorer):
    """Clean language: 1 - the probability of offensive language that alt-profanity-check gives. A stand-in for `toxicity` without network.

    A linear model over words and characters that comes with the package, trained on 200,000 labelled comments and tweets. It knows
    swearwords, insults and slurs, and little else: a polite threat passes. English only. The package pins the scikit-learn it was made with.
    """

    name: ClassVar[str] = "profanity"
    version: ClassVar[str] = "1"
    card: ClassVar[Card] = Card(
        measures="Absence of offensive words. Weaker than toxicity: it does not see what is meant.",
        range=(0.0, 1.0),
        higher="cleaner",
        speed="fast: a linear model",
        licence="alt-profanity-check: MIT",
        offline="yes: the model comes with the package",
    )

    def check(self) -> None:
        self._predict()

    def identity(self) -> str:
        return f"{super().identity()} alt-profanity-check {version('alt-profanity-check')}"

    def __call__(self, answers: Sequence[Answer]) -> Sequence[float]:
        return [1.0 - float(p) for p in self._predict()([answer.text for answer in answers])]

    def _predict(self) -> Any:
        try:
            from profanity_check import predict_prob
        except ImportError:
            raise UpoError('scorer profanity: alt-profanity-check is not installed. Install it with: pip install "upo[rewards]"') from None
        return predict_prob
