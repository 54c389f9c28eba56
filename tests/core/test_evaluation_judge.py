"""Win rates: both orders, inconsistent and missing verdicts, against counts by hand."""

from __future__ import annotations

import threading

import pytest
from evaluation_cases import Listener

from upo.errors import ConfigError, UpoError
from upo.evaluation.judge import Judge, PythonJudge, ScorerJudge, win_rate
from upo.rewards.length import Length
from upo.training.reporter import Silent

PROMPTS = ["p", "q"]
BEFORE, AFTER = [["b1", "b2"], ["b3", "b4"]], [["a1", "a2"], ["a3", "a4"]]


class By(Judge):
    """A judge by a function; remembers what it was asked."""

    name = "by"

    def __init__(self, function) -> None:
        self.function, self.asked = function, []

    def __call__(self, prompt, first, second):
        self.asked.append((prompt, first, second))
        return self.function(first, second)


def test_both_orders_are_asked_and_the_better_side_is_found():
    judge = By(lambda first, second: int(second.startswith("a")))  # whichever place it has, "a..." wins
    found = win_rate(judge, PROMPTS, BEFORE, AFTER, Silent())
    assert judge.asked[:2] == [("p", "b1", "a1"), ("p", "a1", "b1")] and len(judge.asked) == 8
    assert (found.wins, found.losses, found.ties, found.inconsistent, found.failed) == (4, 0, 0, 0, 0)
    assert (found.mean, found.low, found.high) == (1.0, 1.0, 1.0)
    turned = win_rate(judge, PROMPTS, AFTER, BEFORE, Silent())
    assert (turned.wins, turned.losses, turned.mean) == (0, 4, 0.0)


@pytest.mark.parametrize("place", [0, 1])
def test_a_judge_that_goes_by_the_place_only_ties(place):
    found = win_rate(By(lambda first, second: place), PROMPTS, BEFORE, AFTER, Silent())
    assert (found.wins, found.losses, found.ties, found.inconsistent, found.mean) == (0, 0, 4, 4, 0.5)


def test_a_tie_in_one_order_is_a_tie():
    found = win_rate(By(lambda first, second: 1 if second.startswith("a") else None), PROMPTS, BEFORE, AFTER, Silent())
    assert (found.wins, found.ties, found.inconsistent) == (0, 4, 0)


def test_equal_answers_are_a_tie_unasked():
    judge = By(lambda first, second: 0)
    found = win_rate(judge, PROMPTS, BEFORE, [["b1", "b2"], ["b3", "a4"]], Silent())
    assert len(judge.asked) == 2 and (found.ties, found.inconsistent) == (4, 1)


def test_the_interval_is_over_prompts():
    """Prompt p: two wins; q: a win and a loss. Per prompt 1 and 1/2; means of two draws from them are 1/2, 3/4, 1."""
    judge = By(lambda first, second: int(second.startswith("a")) if "b4" not in (first, second) else int(second == "b4"))
    found = win_rate(judge, PROMPTS, BEFORE, AFTER, Silent())
    assert (found.wins, found.losses) == (3, 1) and (found.mean, found.low, found.high) == (0.75, 0.5, 1.0)


def test_pairs_without_a_verdict_are_left_out():
    def moody(first, second):
        if "a2" in (first, second):
            raise UpoError("no verdict within 5 s.")
        return int(second.startswith("a"))

    listener = Listener()
    found = win_rate(By(moody), PROMPTS, BEFORE, AFTER, listener)
    assert (found.wins, found.failed, found.mean) == (3, 1, 1.0)
    assert listener.warnings == ["no verdict within 5 s. Such pairs are left out of the win rate."]


def test_a_judge_that_is_gone_is_not_asked_for_ever():
    def gone(first, second):
        raise UpoError("no verdict within 60 s.")

    judge, listener = By(gone), Listener()
    found = win_rate(judge, ["p"] * 6, [["b"]] * 6, [["a"]] * 6, listener)
    assert len(judge.asked) == 3 and found.failed == 6
    assert (found.mean, found.low, found.high) == (None, None, None)
    assert "failed 3 times in a row" in listener.warnings[-1]


def test_the_higher_score_wins():
    judge = ScorerJudge(Length(low=3, high=9), Silent())
    short, long = "one two three", "one two three four five six"
    assert [judge("p", *pair) for pair in ((short, long), (long, short), (short, short), ("", short))] == [0, 1, None, 1]
    assert judge.name == "length"


@pytest.mark.parametrize(("said", "verdict"), [(0, 0), (1, 1), (None, None), ("tie", None), (1.0, 1)])
def test_a_function_as_judge(said, verdict):
    assert PythonJudge(lambda *texts: said, "f")("p", "a", "b") == verdict


@pytest.mark.parametrize("nonsense", ["the second", 2, -1, True, 0.5, [1]])
def test_nonsense_is_no_verdict(nonsense):
    with pytest.raises(UpoError, match=r"judge f: answered .*; a verdict is 0, 1 or None"):
        PythonJudge(lambda *texts: nonsense, "f")("p", "a", "b")


def test_a_judge_that_raises_or_takes_too_long():
    with pytest.raises(UpoError, match="judge f: raised ValueError: too odd"):
        PythonJudge(lambda *texts: (_ for _ in ()).throw(ValueError("too odd\nmore")), "f")("p", "a", "b")
    release = threading.Event()
    try:
        with pytest.raises(UpoError, match=r"judge f: no verdict within 0\.01 s"):
            PythonJudge(lambda *texts: release.wait(30), "f", timeout=0.01)("p", "a", "b")
    finally:
        release.set()


def test_a_judge_from_a_file(tmp_path):
    (tmp_path / "judge.py").write_text("def prefer(prompt, first, second):\n    return int(len(second) > len(first))\n")
    judge = PythonJudge.load(f"{tmp_path}/judge.py:prefer", 10.0)
    assert judge.name == "prefer" and judge("p", "a", "bb") == 1
    with pytest.raises(ConfigError, match="has no function other"):
        PythonJudge.load(f"{tmp_path}/judge.py:other", 10.0)
