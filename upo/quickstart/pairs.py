"""How the bundled pairs are made from sampled answers: a label by rule, and a choice of pairs that keeps the label neutral."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from upo.evaluation.answers import sentence_ends


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt; only the chosen one's first sentence has a comma."""

    prompt: str
    chosen: str
    rejected: str


def opens_with_comma(text: str) -> bool:
    """Whether there is a comma before the end of the first sentence."""
    return "," in text[: min(sentence_ends(text), default=len(text))]


def choose_pairs(answers: Sequence[tuple[str, Sequence[str]]], most: int, goal: Callable[[str], float]) -> list[Pair]:
    """Up to `most` disjoint pairs for each (prompt, distinct answers): the chosen answer has a comma in its first sentence, the rejected one not.

    For each prompt in turn the selection of pairs is taken that differs most in the goal, less half of two sums that are to stay near
    zero over all prompts: goal(chosen) - goal(rejected), so that the label tells nothing about the goal; and the goal of the taken
    answers less the mean over all of the prompt's, so that the taken ones are as good as the model's answers are. What is left to learn
    from is the spread.
    """
    pairs: list[Pair] = []
    balance = drift = 0.0
    for prompt, texts in answers:
        worth = [goal(text) for text in texts]
        mean = sum(worth) / max(len(worth), 1)
        sides = [[i for i, text in enumerate(texts) if opens_with_comma(text) is side] for side in (True, False)]
        count = min(most, *map(len, sides))
        found = []
        for chosen, rejected in itertools.product(*(itertools.combinations(side, count) for side in sides)):
            gains = sum(worth[i] for i in chosen), sum(worth[i] for i in rejected)
            spread = sum((worth[i] - mean) ** 2 for i in (*chosen, *rejected))
            sums = balance + gains[0] - gains[1], drift + gains[0] + gains[1] - 2 * count * mean
            found.append((spread - 0.5 * (abs(sums[0]) + abs(sums[1])), list(zip(chosen, rejected, strict=True)), sums))
        if count:
            _, best, (balance, drift) = max(found, key=lambda entry: entry[0])
            pairs += [Pair(prompt, texts[i], texts[j]) for i, j in best]
    return pairs
