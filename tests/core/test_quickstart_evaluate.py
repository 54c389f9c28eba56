"""Figures of the quickstart against hand values and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from upo.backend import Sampling
from upo.quickstart import evaluate as ev
from upo.quickstart.run import Clock, example, grade, readability
from upo.train.reporter import Silent


def test_repetition_counts_trigrams_seen_before() -> None:
    assert ev.repetition("a b c d") == 0  # abc, bcd
    assert ev.repetition("a b c a b c") == pytest.approx(1 / 4)  # abc bca cab abc
    assert ev.repetition("No no no no no") == pytest.approx(2 / 3)  # three trigrams, one kind, whatever the case
    assert ev.repetition("two words") == ev.repetition("") == 0


def test_measures_of_fixed_answers() -> None:
    answers = [["one two three four", ""], ["x y", "a b c a b c"]]
    rewards = np.array([[1.0, 0.0], [0.5, 0.1]])
    found = ev.measure(answers, rewards, lambda text: float(len(text.split())) if text else None)
    assert found == ev.Measured(reward=pytest.approx(0.4), grade=4.0, words=3.0, repetition=pytest.approx(0.0625), empty=1)


def test_no_gradable_answer_has_no_grade() -> None:
    assert math.isnan(ev.measure([[""]], np.zeros((1, 1)), lambda _: None).grade)


def test_grade_and_reward_by_hand() -> None:
    # Six words of one syllable in one sentence: 0.39 * 6 + 11.8 - 15.59 = -1.45, so the reward is 1.
    assert grade("The cat sat on the mat.") == pytest.approx(-1.45)
    assert grade("") is None
    np.testing.assert_allclose(readability([["The cat sat on the mat.", ""]]), [[1.0, 0.0]])


def test_interval_of_two_prompts_is_known_exactly() -> None:
    # Means of two draws from {0, 1}: 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4, so 2.5 % and 97.5 % lie at the ends.
    found = ev.change(np.zeros((2, 3)), np.array([[0.0] * 3, [1.0] * 3]))
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)


def test_interval_of_many_prompts_is_the_normal_one() -> None:
    per_prompt = np.random.default_rng(0).normal(0.2, 0.3, size=200)
    before = np.full((200, 2), 0.1)
    found = ev.change(before, before + per_prompt[:, None])
    half = 1.959964 * per_prompt.std() / math.sqrt(200)
    assert found.mean == pytest.approx(per_prompt.mean())
    # 10,000 draws place a 2.5 % quantile within about 3 % of the half width.
    assert found.mean - found.low == pytest.approx(half, rel=0.06)
    assert found.high - found.mean == pytest.approx(half, rel=0.06)


def test_interval_is_over_prompts_not_answers() -> None:
    # Answers that differ only within a prompt leave nothing uncertain between prompts.
    found = ev.change(np.zeros((5, 2)), np.tile([0.0, 1.0], (5, 1)))
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)


def test_change_is_paired_and_repeatable() -> None:
    rng = np.random.default_rng(1)
    before = rng.uniform(size=(30, 3))
    constant = ev.change(before, before + 0.125)
    assert constant.high - constant.low < 1e-12 and constant.mean == pytest.approx(0.125)
    other = rng.uniform(size=(30, 3))
    assert ev.change(before, other) == ev.change(before, other)
    assert ev.change(before, other) != ev.change(before, other, seed=1)
    flipped = ev.change(other, before)
    assert flipped.mean == pytest.approx(-ev.change(before, other).mean)


class Echo:
    """Learner and tokenizer in one: an answer names its prompt, its place and the seed."""

    def prompt_ids(self, messages: list[dict[str, str]]) -> np.ndarray:
        return np.array([int(messages[0]["content"])], np.int32)

    def generate(self, prompts: list[np.ndarray], sampling: Sampling) -> list[np.ndarray]:
        return [np.array([p[0], i, sampling.seed], np.int32) for i, p in enumerate(prompts)]

    def decode(self, tokens: np.ndarray) -> str:
        return " {}/{}/{}\n".format(*tokens)


def test_answers_are_grouped_by_prompt() -> None:
    found = ev.answer(Echo(), Echo(), ["7", "8"], Sampling(seed=5), Silent(), "answers")  # type: ignore[arg-type]
    assert found == [[f"{prompt}/{i}/5" for i in range(first, first + ev.SAMPLES)] for prompt, first in ((7, 0), (8, ev.SAMPLES))]


class Spoken:
    """A learner that gives the texts in turn, one token a letter."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def prompt_ids(self, messages: object) -> np.ndarray:
        return np.zeros(1, np.int32)

    def generate(self, prompts: list[np.ndarray], sampling: Sampling) -> list[np.ndarray]:
        return [np.array([ord(c) for c in text], np.int32) for text in self.texts]

    def decode(self, tokens: np.ndarray) -> str:
        return "".join(map(chr, tokens))


def test_only_answers_stopped_by_the_limit_lose_their_broken_sentence() -> None:
    cut, ended, endless = "It is so. And th", "It is so. Or not", "It is so and so "
    assert len(cut) == len(ended) == len(endless) == 16
    learner = Spoken(cut, ended[:-1], endless)
    found = ev.answer(learner, learner, ["q"], Sampling(max_tokens=16), Silent(), "answers")  # type: ignore[arg-type]
    assert found == [["It is so.", "It is so. Or no", "It is so and so"]]


def test_compare_puts_before_and_after_in_their_places() -> None:
    hard = "Photosynthesis necessitates considerable electromagnetic irradiation."
    easy = "The sun is hot. We like it a lot."
    found = ev.compare([[hard], [hard]], [[easy], [easy]], readability, grade)
    assert (found["before"]["reward"], found["after"]["reward"]) == (0.0, 1.0)
    assert found["reward_change"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert found["before"]["words"] == 5 and found["after"]["words"] == 9


def test_example_is_the_question_with_the_median_change() -> None:
    hard, easy = "Photosynthesis necessitates considerable electromagnetic irradiation.", "The sun is hot. We like it a lot."
    before = [[hard, hard], [hard, hard], [easy, easy]]
    after = [[easy, easy], [easy, hard], [hard, hard]]  # changes 1, 1/2, -1
    assert example(["a", "b", "c"], before, after) == {"prompt": "b", "before": hard, "after": easy}


def test_clock_adds_up_laps() -> None:
    clock = Clock()
    for name in ("a", "b", "a"):
        clock.lap(name)
    spent = clock.seconds()
    assert set(spent) == {"a", "b", "total"} and spent["a"] + spent["b"] == pytest.approx(spent["total"])
