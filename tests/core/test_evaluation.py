"""Sampled answers and what is counted in them, against hand values and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from upo.backend import Sampling
from upo.evaluation.answers import repetition, sample, style, whole_sentences
from upo.evaluation.change import change, interval
from upo.training.reporter import Silent


def test_repetition_counts_trigrams_seen_before() -> None:
    assert repetition("a b c d") == 0  # abc, bcd
    assert repetition("a b c a b c") == pytest.approx(1 / 4)  # abc bca cab abc
    assert repetition("No no no no no") == pytest.approx(2 / 3)  # three trigrams, one kind, whatever the case
    assert repetition("two words") == repetition("") == 0


def test_style_of_fixed_answers() -> None:
    found = style(["one two three four", "", "a b c a b c"])
    assert (found.words, found.repetition, found.empty) == (pytest.approx(10 / 3), pytest.approx(1 / 12), 1)


def test_interval_of_numbers_per_prompt() -> None:
    assert interval(np.array([0.0, 1.0])) == change(np.zeros(2), np.array([0.0, 1.0]))


def test_interval_of_two_prompts_is_known_exactly() -> None:
    # Means of two draws from {0, 1}: 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4, so 2.5 % and 97.5 % lie at the ends.
    found = change(np.zeros((2, 3)), np.array([[0.0] * 3, [1.0] * 3]))
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)


def test_interval_of_many_prompts_is_the_normal_one() -> None:
    per_prompt = np.random.default_rng(0).normal(0.2, 0.3, size=200)
    before = np.full((200, 2), 0.1)
    found = change(before, before + per_prompt[:, None])
    half = 1.959964 * per_prompt.std() / math.sqrt(200)
    assert found.mean == pytest.approx(per_prompt.mean())
    # 10,000 draws place a 2.5 % quantile within about 3 % of the half width.
    assert found.mean - found.low == pytest.approx(half, rel=0.06)
    assert found.high - found.mean == pytest.approx(half, rel=0.06)


def test_interval_is_over_prompts_not_answers() -> None:
    # Answers that differ only within a prompt leave nothing uncertain between prompts.
    found = change(np.zeros((5, 2)), np.tile([0.0, 1.0], (5, 1)))
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)


def test_change_is_paired_and_repeatable() -> None:
    rng = np.random.default_rng(1)
    before = rng.uniform(size=(30, 3))
    constant = change(before, before + 0.125)
    assert constant.high - constant.low < 1e-12 and constant.mean == pytest.approx(0.125)
    other = rng.uniform(size=(30, 3))
    assert change(before, other) == change(before, other)
    assert change(before, other) != change(before, other, seed=1)
    flipped = change(other, before)
    assert flipped.mean == pytest.approx(-change(before, other).mean)


class Spoken:
    """A learner that gives the texts in turn, one token a letter."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def generate(self, prompts: list[np.ndarray], sampling: Sampling) -> list[np.ndarray]:
        return [np.array([ord(c) for c in text], np.int32) for text in self.texts]

    def decode(self, tokens: np.ndarray) -> str:
        return "".join(map(chr, tokens))


def test_only_answers_stopped_by_the_limit_lose_their_broken_sentence() -> None:
    cut, ended, endless = "It is so. And th", "It is so. Or not", "It is so and so "
    assert len(cut) == len(ended) == len(endless) == 16
    learner = Spoken(cut, ended[:-1], endless)
    found = sample(learner, learner, [np.zeros(1, np.int32)] * 3, 1, Sampling(max_tokens=16), Silent(), "answers")
    assert found == [["It is so."], ["It is so. Or no"], ["It is so and so"]]


def test_texts_are_cut_at_their_last_complete_sentence() -> None:
    assert whole_sentences(" One. Two is cut he", ended=False) == "One."
    assert whole_sentences("It costs 3.50 now", ended=False) is None
    assert whole_sentences('He said "go!" And then', ended=False) == 'He said "go!"'
    assert whole_sentences("Do this:\n\n1. Stir.\n2. Wa", ended=False) == "Do this:\n\n1. Stir."
    assert whole_sentences('Ask her. Then call "Mr. Smith', ended=False) == "Ask her."
    assert whole_sentences("No full stop", ended=True) == "No full stop"
    assert whole_sentences("  ", ended=True) is None
