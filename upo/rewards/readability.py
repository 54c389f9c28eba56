"""Plain language: the reading-level reward of UPO."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from upo.errors import ConfigError, UpoError
from upo.rewards.base import TextScorer
from upo.rewards.english import is_latin, sentences, syllables, words

_HINT = 'pip install "upo[rewards]"'


def flesch_kincaid(text: str) -> float:
    """US school grade: 0.39 words/sentence + 11.8 syllables/word - 15.59 (Kincaid et al. 1975). Raises ValueError without words.

    Counts are those of `upo.rewards.english`. On 2,700 chat answers the grade lies 0.5 above textstat 0.7.4's (correlation 0.89), which
    counts 4 % too few syllables and takes a list without full stops for one sentence.
    """
    found = words(text)
    if not found:
        raise ValueError("no words")
    return 0.39 * len(found) / sentences(text) + 11.8 * sum(map(syllables, found)) / len(found) - 15.59


@dataclass(frozen=True)
class Readability(TextScorer):
    """Reading level: 1 at grade 4 and below, falling linearly to 0 at grade 9 and above.

        R1 = clip((9 - grade) / 5, 0, 1)

    grade: `flesch_kincaid` (Flesch-Kincaid), or `consensus` (textstat's text_standard, the paper's; needs textstat 0.7.4). English only.
    An answer of fewer than three different words, or mostly in another script, scores 0.
    """

    grade: str = "flesch_kincaid"

    name: ClassVar[str] = "readability"
    version: ClassVar[str] = "1"
    range: ClassVar[tuple[float, float] | None] = (0.0, 1.0)
    card: ClassVar[str] = (
        "Plain English by reading level (1: grade 4 or below, 0: grade 9 or above). Says nothing about truth or helpfulness."
    )

    def __post_init__(self) -> None:
        if self.grade not in ("flesch_kincaid", "consensus"):
            raise ConfigError(f'readability: grade must be flesch_kincaid or consensus (got "{self.grade}").')

    def identity(self) -> str:
        if self.grade == "flesch_kincaid":
            return super().identity()
        from importlib.metadata import version

        return f"{super().identity()} textstat {version('textstat')}"

    def check(self) -> None:
        if self.grade == "consensus":
            _consensus("Only a test. It says whether textstat works here.")

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> Sequence[float]:
        grade = flesch_kincaid if self.grade == "flesch_kincaid" else _consensus
        return [min(max((9 - grade(text)) / 5, 0.0), 1.0) if _is_answer(text) else 0.0 for text in completions]


def _is_answer(text: str) -> bool:
    return len({word.lower() for word in words(text)}) >= 3 and is_latin(text)


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
