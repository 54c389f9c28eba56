"""Figures of the quickstart against hand values and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from upo.backend import Sampling
from upo.quickstart import evaluate as ev
from upo.quickstart.run import Clock, example, grade, readability
from upo.training.reporter import Silent


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
