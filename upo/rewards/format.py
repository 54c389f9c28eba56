"""The outer form of answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from upo.losses.options import option
from upo.rewards.base import Answer, Card, TextScorer

_END = re.compile(r"[.!?…。！？][\"'”’»)\]*_]*\s*\Z")
_ITEM = re.compile(r"^[ \t]*(?:[-*•+]|\d{1,3}[.)])[ \t]+\S", re.MULTILINE)
_MARKDOWN = re.compile(r"^#{1,6} |^[ \t]*[-*+] |^```|^\||\*\*[^*\n]+\*\*|`[^`\n]+`|\[[^\]\n]+\]\([^)\n]+\)", re.MULTILINE)


@dataclass(frozen=True)
class Format(TextScorer):
    """1 for an answer that keeps a rule of form, else 0; an empty answer keeps none.

    rule:

        complete    ends as a sentence does, or with a closed code block: it was not cut off
        paragraph   a single paragraph without line breaks
        list        at least two list items, bulleted or numbered
        plain       no Markdown: no headings, bullets, tables, bold, code or links
    """

    rule: str = option("complete", choices=("complete", "paragraph", "list", "plain"))

    name: ClassVar[str] = "format"
    version: ClassVar[str] = "1"
    card: ClassVar[Card] = Card(
        measures="Whether an answer keeps a rule of form. Says nothing about what it says.",
        range=(0.0, 1.0),
        higher="the rule is kept",
        speed="fast: a formula",
        licence="our own code (Apache-2.0)",
        offline="yes",
    )

    def __call__(self, answers: Sequence[Answer]) -> Sequence[float]:
        keeps = {"complete": _complete, "paragraph": _paragraph, "list": _list, "plain": _plain}[self.rule]
        return [float(bool(answer.text.strip()) and keeps(answer.text)) for answer in answers]


def _complete(text: str) -> bool:
    fences = sum(line.startswith("```") for line in text.splitlines())
    return fences % 2 == 0 and (_END.search(text) is not None or (fences > 0 and text.rstrip().endswith("```")))


def _paragraph(text: str) -> bool:
    return "\n" not in text.strip()


def _list(text: str) -> bool:
    return len(_ITEM.findall(text)) >= 2


def _plain(text: str) -> bool:
    return _MARKDOWN.search(text) is None
