"""How the bundled pairs are made from sampled answers: honest ends, a label by rule, and a choice of pairs that keeps the label neutral."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from upo.rewards.english import words

# Words of a question that do not say what it is about.
FUNCTION_WORDS = frozenset(
    """a am an and any are as at be been before between by can could did difference do does during explain first for from get give good
    had has have how i if in into is it its job like make makes mean me my of off on one or out over say should so some someone such than
    that the their them then there they thing things this three tips to up use was way we were what when where which while who why will
    with without would you your""".split()
)
_END = re.compile(r"[.!?][\"”’)]*(?=\s|$)")
_NO_END = re.compile(r"(?:^|[\s(\"“])(?:\d{1,2}|Mr|Mrs|Ms|Dr|St|vs|etc|e\.g|i\.e)\.$")


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt; the chosen one speaks more of what was asked."""

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


def on_topic(prompt: str, answer: str) -> int:
    """How often the answer uses a content word of the question; words count as equal if their first five letters are."""
    topic = {w.lower()[:5] for w in words(prompt) if w.lower() not in FUNCTION_WORDS}
    return sum(w.lower()[:5] in topic for w in words(answer))


def choose_pairs(
    answers: Sequence[tuple[str, Sequence[str]]], per_prompt: int, neutral_to: Sequence[Callable[[str], float]], wide: int = 3
) -> list[Pair]:
    """`per_prompt` disjoint pairs for each (prompt, distinct answers) that has them, labelled by `on_topic`; ties are no pairs.

    For each prompt in turn, of the `wide` selections of pairs with the largest margins the one is taken that best keeps the sums of
    chosen - rejected of the measures `neutral_to` near zero. So the label hardly tells anything about those measures.
    """
    pairs: list[Pair] = []
    balance = [0.0] * len(neutral_to)
    for prompt, texts in answers:
        topic = [on_topic(prompt, t) for t in texts]
        ordered = [(i, j) if topic[i] > topic[j] else (j, i) for i, j in itertools.combinations(range(len(texts)), 2) if topic[i] != topic[j]]
        selections = [s for s in itertools.combinations(ordered, per_prompt) if len({i for pair in s for i in pair}) == 2 * per_prompt]
        if not selections:
            continue
        selections.sort(key=lambda s: -sum(min(topic[i] - topic[j], 3) for i, j in s))  # a margin above 3 is no clearer
        shifts = [[sum(f(texts[i]) - f(texts[j]) for i, j in s) for f in neutral_to] for s in selections[:wide]]
        best = min(range(len(shifts)), key=lambda k: sum(abs(b + x) for b, x in zip(balance, shifts[k], strict=True)))
        balance = [b + x for b, x in zip(balance, shifts[best], strict=True)]
        pairs += [Pair(prompt, texts[i], texts[j]) for i, j in selections[best]]
    return pairs
