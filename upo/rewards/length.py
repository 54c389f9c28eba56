"""Shorter answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from upo.errors import ConfigError
from upo.losses.options import option
from upo.rewards.base import Answer, Card, TextScorer
from upo.rewards.english import words


@dataclass(frozen=True)
class Length(TextScorer):
    """Brevity in words: 1 up to `low` words, falling linearly to 0 at `high` words and beyond. Fewer than three words score 0."""

    low: float = option(20.0, least=3)
    high: float = 100.0

    name: ClassVar[str] = "length"
    version: ClassVar[str] = "1"
    card: ClassVar[Card] = Card(
        measures="Brevity, in words. Says nothing about what is left out.",
        range=(0.0, 1.0),
        higher="shorter",
        speed="fast: a formula",
        licence="our own code (Apache-2.0)",
        offline="yes",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low < self.high:
            raise ConfigError(f"length: needs low < high (got low {self.low:g}, high {self.high:g}).")

    def __call__(self, answers: Sequence[Answer]) -> Sequence[float]:
        counts = [len(words(answer.text)) for answer in answers]
        return [min(max((self.high - n) / (self.high - self.low), 0.0), 1.0) if n >= 3 else 0.0 for n in counts]
