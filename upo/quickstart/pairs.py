"""How the bundled pairs are made from sampled answers: honest ends, a label by rule, and a choice of pairs that keeps the label neutral."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from upo.rewards.english import words

CLEAR, ENOUGH = 5, 10  # words: a smaller difference is no preference; a larger one is no clearer
_END = re.compile(r"[.!?][\"”’)]*(?=\s|$)")
_NO_END = re.compile(r"(?:^|[\s(\"“])(?:\d{1,2}|Mr|Mrs|Ms|Dr|St|vs|etc|e\.g|i\.e)\.$")


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt; the chosen one is the shorter by at least CLEAR words."""

    prompt: str
    chosen: str
    rejected: str


def whole_sentences(text: str, ended: bool) -> str | None:
    """The text up to its last complete sentence, so that the end of turn after it is true; None if there is none.

    `ended`: the model itself ended here, so nothing is cut. The number of a list item ("2.") or an abbreviation ("Mr.") does not end a sentence.
    """
    text = text.strip()
    if ended:
        return text or None
    ends = [m.end() for m in _END.finditer(text) if not _NO_END.search(text[: m.end()])]
    return text[: ends[-1]] if ends else None


def choose_pairs(
    answers: Sequence[tuple[str, Sequence[str]]], per_prompt: int, neutral_to: Callable[[str], float], wide: int = 6
) -> list[Pair]:
    """`per_prompt` disjoint pairs for each (prompt, distinct answers) that has them: the shorter answer is the chosen one.

    For each prompt in turn, of the `wide` selections of pairs with the clearest differences the one is taken that best keeps the sum of
    `neutral_to`, chosen - rejected, near zero. So the label hardly tells anything about that measure.
    """
    pairs: list[Pair] = []
    balance = 0.0
    for prompt, texts in answers:
        size = [len(words(t)) for t in texts]
        clear = [(i, j) if size[i] < size[j] else (j, i) for i, j in itertools.combinations(range(len(texts)), 2) if abs(size[i] - size[j]) >= CLEAR]
        selections = [s for s in itertools.combinations(clear, per_prompt) if len({i for pair in s for i in pair}) == 2 * per_prompt]
        if not selections:
            continue
        selections.sort(key=lambda s: -sum(min(size[j] - size[i], ENOUGH) for i, j in s))
        shifts = [sum(neutral_to(texts[i]) - neutral_to(texts[j]) for i, j in s) for s in selections[:wide]]
        best = min(range(len(shifts)), key=lambda k: abs(balance + shifts[k]))
        balance += shifts[best]
        pairs += [Pair(prompt, texts[i], texts[j]) for i, j in selections[best]]
    return pairs
