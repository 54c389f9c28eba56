"""Scorers of text by formula: values worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from upo.errors import ConfigError, DataError, UpoError
from upo.rewards import Answer, build_scorer
from upo.rewards.grades import GRADES


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPO_CACHE", str(tmp_path / "cache"))


def answers(*texts: str, chosen: str | None = None) -> list[Answer]:
    return [Answer(f"d.jsonl:{i}", "prompt", text, chosen=chosen) for i, text in enumerate(texts, 1)]


def scores(name: str, *texts: str, **options: object) -> list[float]:
    return build_scorer(name, **options).score(answers(*texts))


def test_grades_by_hand() -> None:
    text = "The scientist explained everything carefully. Nobody in the room asked a question."
    words, sentences, syllables, letters, long = 12, 2, 22, 69, 4  # long: scientist, everything, carefully, nobody
    expected = {
        "flesch_kincaid": 0.39 * words / sentences + 11.8 * syllables / words - 15.59,
        "gunning_fog": 0.4 * (words / sentences + 100 * long / words),
        "smog": 1.0430 * math.sqrt(long * 30 / sentences) + 3.1291,
        "coleman_liau": 0.0588 * (100 * letters / words) - 0.296 * (100 * sentences / words) - 15.8,
        "ari": 4.71 * letters / words + 0.5 * words / sentences - 21.43,
    }
    assert {name: grade(text) for name, grade in GRADES.items()} == pytest.approx(expected, abs=1e-9)
    for grade, value in expected.items():
        assert scores("readability", text, grade=grade, low=2.0, high=30.0) == [pytest.approx((30 - value) / 28)]


def test_the_scale_of_readability_is_an_option() -> None:
    with pytest.raises(ConfigError, match="needs low < high"):
        build_scorer("readability", low=9.0)
    grade = GRADES["ari"]("The cat sat on the mat again today.")
    assert scores("readability", "The cat sat on the mat again today.", grade="ari", low=grade - 1, high=grade + 1) == [pytest.approx(0.5)]


def test_length_match() -> None:
    scorer = build_scorer("length_match")
    four = "one two three four"
    assert scorer.score(answers(four, "one two", "one two three four five six seven eight", "", chosen=four)) == [1.0, 0.5, 0.5, 0.0]
    assert scorer.score(answers(four, chosen="one two")) == [0.5], "the chosen answer is part of what is remembered"
    with pytest.raises(DataError, match=r"d\.jsonl:1: scorer length_match needs one chosen answer"):
        scorer.score(answers("x"))


def test_repetition() -> None:
    # 3-word runs of "a b c a b c": abc bca cab abc, 3 different of 4
    assert scores("repetition", "one two three four five", "a b c A B C", "ha " * 12, "yes it is", "go on", "") == [1.0, 0.75, 0.1, 1.0, 0.0, 0.0]
    assert scores("repetition", "a b a b", "a b c", n=1) == [0.5, 1.0]
    assert scores("repetition", "a b a b", n=5) == [1.0]
    with pytest.raises(ConfigError, match="n must be at least 1"):
        build_scorer("repetition", n=0)
    with pytest.raises(ConfigError, match="n must be a whole number"):
        build_scorer("repetition", n=1.5)


def test_diversity() -> None:
    # windows of 3 in "a b a b c": aba 2, bab 2, abc 3
    assert scores("diversity", "a b a b c", "a b c d", window=3) == [pytest.approx(7 / 9), 1.0]
    assert scores("diversity", "The the cat sat", "x", "a a a") == [0.75, 0.0, pytest.approx(1 / 3)]


def test_pattern() -> None:
    texts = ("Thank you!", "I thank you", "no")
    assert scores("pattern", *texts, pattern="(?i)thank you") == [1.0, 1.0, 0.0]
    assert scores("pattern", *texts, pattern="(?i)thank you", where="start") == [1.0, 0.0, 0.0]
    assert scores("pattern", *texts, pattern="(?i).*thank you", where="whole") == [0.0, 1.0, 0.0]
    for options, message in (({"pattern": "("}, "is not a regular expression"), ({}, "pattern must be given"), ({"pattern": "x", "where": "end"}, "where must be")):
        with pytest.raises(ConfigError, match=message):
            build_scorer("pattern", **options)


def test_a_pattern_that_takes_forever_is_stopped_and_the_row_named() -> None:
    scorer = build_scorer("pattern", pattern="(a+)+$", limit=0.5)
    with pytest.raises(DataError, match=r"d\.jsonl:2: scorer pattern took longer than 0\.5 s and was stopped") as caught:
        scorer.score(answers("aaa", "a" * 64 + "b", "b"))
    assert "\n" not in str(caught.value)
    assert scorer.score(answers("aaa", "b")) == [1.0, 0.0], "it works again"


def test_json() -> None:
    texts = ('{"a": 1}', " [1, 2]\n", "{a: 1}", '```json\n{"a": 1}\n```', "NaN", "", "[" * 100_000)
    assert scores("json", *texts) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert scores("json", *texts, form="fenced") == [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]


def test_json_schema(tmp_path: Path) -> None:
    pytest.importorskip("jsonschema", reason='needs the extra: pip install "upo[rewards]"')
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}))
    assert scores("json", '{"a": 1}', '{"a": "1"}', "{}", "no", schema=str(path)) == [1.0, 0.0, 0.0, 0.0]
    path.write_text(json.dumps({"type": "array"}))
    assert scores("json", '{"a": 1}', "[]", schema=str(path)) == [0.0, 1.0], "what the file says is part of what is remembered"
    path.write_text(json.dumps({"type": "nonsense"}))
    with pytest.raises(ConfigError, match="is no JSON schema"):
        build_scorer("json", schema=str(path))
    path.write_text(json.dumps({"$ref": "http://127.0.0.1:9/schema.json"}))
    with pytest.raises(UpoError, match="cannot be applied"):
        scores("json", "[]", schema=str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        build_scorer("json", schema=str(tmp_path / "none.json"))
    path.write_text(json.dumps({"pattern": "^(a+)+$"}))
    with pytest.raises(DataError, match=r"d\.jsonl:1: scorer json took longer than 0\.5 s"):
        scores("json", json.dumps("a" * 64 + "b"), schema=str(path), limit=0.5)


@pytest.mark.parametrize(
    ("rule", "kept", "broken"),
    [
        ("complete", ["It is so.", 'He said "yes."', "Really?  ", "Code:\n```\nx = 1\n```"], ["It is so that", "", "Code:\n```\nx = 1.", "and,"]),
        ("paragraph", ["one. two.", "one\n"], ["one\ntwo", " "]),
        ("list", ["- one\n- two", "Do:\n1. one\n2) two", "* a\n\n* b"], ["- one", "one\ntwo", "2-3 eggs"]),
        ("plain", ["One two.\n\nThree.", "2 * 3 * 4", "a [b] (c)"], ["# Title", "- one", "**bold** it", "use `x`", "see [x](http://y)", "| a | b |"]),
    ],
)
def test_format(rule: str, kept: list[str], broken: list[str]) -> None:
    assert scores("format", *kept, *broken, rule=rule) == [1.0] * len(kept) + [0.0] * len(broken)


# --- Models that come with a package ----------------------------------------------------------------------------------------------


def test_sentiment() -> None:
    """Values that VADER's authors publish in its README."""
    pytest.importorskip("vaderSentiment", reason='needs the extra: pip install "upo[rewards]"')
    published = {
        "VADER is smart, handsome, and funny.": 0.8316,
        "VADER is not smart, handsome, nor funny.": -0.7424,
        "Today SUX!": -0.5461,
        "The book was good.": 0.4404,
        "": 0.0,
    }
    assert scores("sentiment", *published) == list(published.values())


def test_profanity() -> None:
    """Sides of 0.5 that its README and the wording itself leave no doubt about; the exact numbers change with its training."""
    pytest.importorskip("profanity_check", reason='needs the extra: pip install "upo[rewards]"')
    clean = ["predict() takes an array and returns a 1 or 0 for each.", "Thank you, that is very kind.", "The weather is nice today."]
    foul = ["go to hell, you scum", "fuck you, you stupid bitch", "You dumb asshole."]
    found = scores("profanity", *clean, *foul)
    assert min(found[:3]) > 0.8 and max(found[3:]) < 0.5 and all(0 <= value <= 1 for value in found)


@pytest.mark.parametrize(("name", "module"), [("sentiment", "vaderSentiment.vaderSentiment"), ("profanity", "profanity_check")])
def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch, name: str, module: str) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(UpoError, match=r'is not installed\. Install it with: pip install "upo\[rewards\]"'):
        build_scorer(name)
