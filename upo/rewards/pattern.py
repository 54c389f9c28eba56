"""Answers that match a regular expression."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from upo.errors import ConfigError
from upo.losses.options import option
from upo.rewards.base import Answer, Card, TextScorer


@dataclass(frozen=True)
class Pattern(TextScorer):
    """1 where a regular expression matches, else 0: `{scorer: pattern, pattern: "(?i)thank you"}`. A negative weight turns it round.

    where: `anywhere` in the answer, at its `start`, or as the `whole` of it. The syntax is that of Python's re; (?i), (?m), (?s) at its
    beginning set flags. A pattern may take forever on some text, so matching runs in a process of its own: after `limit` seconds it is
    stopped, and the row is named.
    """

    pattern: str = ""
    where: str = option("anywhere", choices=("anywhere", "start", "whole"))
    limit: float = option(5.0, above=0)

    name: ClassVar[str] = "pattern"
    version: ClassVar[str] = "1"
    card: ClassVar[Card] = Card(
        measures="Whether an answer matches a regular expression of yours.",
        range=(0.0, 1.0),
        higher="it matches",
        speed="fast: one match an answer, in a process of its own",
        licence="our own code (Apache-2.0)",
        offline="yes",
    )
    volatile: ClassVar[frozenset[str]] = frozenset({"limit"})
    batch: ClassVar[int] = 64
    isolated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            re.compile(self.pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"pattern: pattern {self.pattern!r:.80} is not a regular expression ({error}).") from None

    def __call__(self, answers: Sequence[Answer]) -> Sequence[float]:
        compiled = re.compile(self.pattern)
        match = {"anywhere": compiled.search, "start": compiled.match, "whole": compiled.fullmatch}[self.where]
        return [float(match(answer.text) is not None) for answer in answers]
