"""Plain language: the reading-level reward of UPO."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from upo.errors import ConfigError, UpoError
from upo.losses.options import option
from upo.rewards.base import Answer, Card, TextScorer
from upo.rewards.english import is_latin, words
from upo.rewards.grades import GRADES

_HINT = 'pip install "upo[rewards]"'


@dataclass(frozen=True)
class Readability(TextScorer):
    """Reading level: 1 at grade `low` and below, falling linearly to 0 at grade `high` and above.

        R1 = clip((high - grade) / (high - low), 0, 1)

    grade, as a US school year:

        flesch_kincaid   0.39 words/sentence + 11.8 syllables/word - 15.59
        gunning_fog      0.4 (words/sentence + 100 long words/word); long: three syllables or more
        smog             1.043 sqrt(30 long words/sentence) + 3.1291; meant for 30 sentences or more
        coleman_liau     5.88 letters/word - 29.6 sentences/word - 15.8
        ari              4.71 letters/word + 0.5 words/sentence - 21.43
        consensus        textstat's text_standard, the paper's; needs textstat 0.7.4

    An answer of fewer than three different words, or mostly in another script than Latin, scores 0. Paper: UPO, section 4, with grades 4 and 9.
    """

    grade: str = option("flesch_kincaid", choices=(*GRADES, "consensus"))
    low: float = 4.0
    high: float = 9.0

    name: ClassVar[str] = "readability"
    version: ClassVar[str] = "1"
    card: ClassVar[Card] = Card(
        measures="Plain English by reading level. Says nothing about truth or helpfulness, and means nothing for other languages.",
        range=(0.0, 1.0),
        higher="easier to read",
        speed="fast: a formula",
        licence="published formulas, our own code (Apache-2.0); consensus: textstat (MIT)",
        offline="yes",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low < self.high:
            raise ConfigError(f"readability: needs low < high (got low {self.low:g}, high {self.high:g}).")

    def identity(self) -> str:
        if self.grade != "consensus":
            return super().identity()
        from importlib.metadata import version

        return f"{super().identity()} textstat {version('textstat')}"

    def check(self) -> None:
        if self.grade == "consensus":
            _consensus("Only a test. It says whether textstat works here.")

    def __call__(self, answers: Sequence[Answer]) -> Sequence[float]:
        return [self.one(answer.text) for answer in answers]

    def one(self, text: str) -> float:
        """R1 of a text."""
        if len({word.lower() for word in words(text)}) < 3 or not is_latin(text):
            return 0.0
        grade = GRADES.get(self.grade, _consensus)(text)
        return min(max((self.high - grade) / (self.high - self.low), 0.0), 1.0)


def _consensus(text: str) -> float:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 0.7.4 imports pkg_resources, which is deprecated
            import textstat
    except ImportError as error:
        what = "textstat is not installed" if error.name == "textstat" else f"textstat cannot be imported ({error})"
        raise UpoError(f"readability: grade: consensus: {what}. Install it with: {_HINT}") from None
    try:
        return float(textstat.text_standard(text, float_output=True))
    except LookupError:  # later versions want a corpus download
        raise UpoError(
            f"readability: grade: consensus: this textstat needs data that is not installed. Version 0.7.4 does not: {_HINT}"
        ) from None
