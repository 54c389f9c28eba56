"""Shorter answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from upo.errors import ConfigError
from upo.rewards.base import TextScorer
from upo.rewards.english import words


@dataclass(frozen=True)
class Length(TextScorer):
    """Brevity in words: 1 up to `low` words, falling linearly to 0 at `high` words and beyond. Fewer than three words score 0."""

    low: float = 20.0
    high: float = 100.0

    name: ClassVar[str] = "length"
    version: ClassVar[str] = "1"
    range: ClassVar[tuple[float, float] | None] = (0.0, 1.0)
    card: ClassVar[str] = "Brevity (1: at most `low` words, 0: `high` words or more). Says nothing about what is left out."

    def __post_init__(self) -> None:
        if not 3 <= self.low < self.high < float("inf"):
            raise ConfigError(f"length: needs 3 <= low < high (got low {self.low:g}, high {self.high:g}).")

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> Sequence[float]:
        counts = [len(words(text)) for text in completions]
        return [min(max((self.high - n) / (self.high - self.low), 0.0), 1.0) if n >= 3 else 0.0 for n in counts]
