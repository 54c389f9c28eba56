"""How the bundled pairs are made from sampled answers: honest ends, a label by rule, and a choice of pairs that keeps the label neutral."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from upo.rewards.english import words

CLEAR = 5  # words: a smaller difference is no preference
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


def choose_pairs(answers: Sequence[tuple[str, Sequence[str]]], per_prompt: int, goal: Callable[[str], float]) -> list[Pair]:
    """`per_prompt` disjoint pairs for each (prompt, distinct answers) that has them: the shorter answer is the chosen one.

    For each prompt in turn the selection of pairs is taken that differs most in the goal, less half of two sums that are to stay near zero over
    all prompts: goal(chosen) - goal(rejected), so that the label tells nothing about the goal; and the goal of the taken answers less the
    mean over all of the prompt's, so that the taken ones are as good as the model's answers are. What is left to learn from is the spread.
    """
    pairs: list[Pair] = []
    balance = drift = 0.0
    for prompt, texts in answers:
        size, worth = [len(words(t)) for t in texts], [goal(t) for t in texts]
        mean = sum(worth) / max(len(worth), 1)
        clear = [(i, j) if size[i] < size[j] else (j, i) for i, j in itertools.combinations(range(len(texts)), 2) if abs(size[i] - size[j]) >= CLEAR]
        found = []
        for selection in itertools.combinations(clear, per_prompt):
            taken = [i for pair in selection for i in pair]
            if len(set(taken)) == len(taken):
                spread = sum((worth[i] - mean) ** 2 for i in taken)
                sums = balance + sum(worth[i] - worth[j] for i, j in selection), drift + sum(worth[i] - mean for i in taken)
                found.append((spread - 0.5 * (abs(sums[0]) + abs(sums[1])), selection, sums))
        if found:
            _, best, (balance, drift) = max(found, key=lambda entry: entry[0])
            pairs += [Pair(prompt, texts[i], texts[j]) for i, j in best]
    return pairs
