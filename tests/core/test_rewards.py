"""Scorers: their values, their guards, their cache, and the weighted sum."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from upo.config import RewardConfig
from upo.data.batch import Example
from upo.errors import ConfigError, DataError, UpoError
from upo.rewards import SCORERS, Answer, Card, TextScorer, build_scorer, score_examples, validate_rewards
from upo.rewards.english import sentences, syllables, words
from upo.rewards.grades import flesch_kincaid
from upo.training.reporter import Silent

HH = Path(__file__).parents[3] / "shared" / "data" / "hh_harmless.jsonl"


class Listener(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def info(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rewards"


def answers(*texts: str) -> list[Answer]:
    return [Answer(f"d.jsonl:{i}", "prompt", text) for i, text in enumerate(texts, 1)]


def example(line: int, *texts: str, kind: str = "pair", **columns: tuple[float, ...]) -> Example:
    tokens = np.array([1], np.int32)
    labels = (1, -1) if kind == "pair" else (0,) * len(texts)
    return Example(f"d.jsonl:{line}", kind, tokens, (tokens,) * len(texts), labels, texts, f"prompt {line}", columns)


def goals(*items: dict) -> list[RewardConfig]:
    return [RewardConfig.model_validate(item) for item in items]


# --- English ----------------------------------------------------------------------------------------------------------------------

# Counted by hand (dictionary pronunciations).
SYLLABLES = {
    1: "cat the make makes walked you yes strength queue eye friend world thought called",
    2: "table wanted boxes being lately hopeful people maybe didn't table's handled science quiet fluent really yellow beyond something",
    3: "family champion beautiful idea area media piano however unhappy hospital everything easiest important video",
    4: "information education radiation reality biology american particular usually",
    5: "university examination opportunity immediately multiplication",
}


@pytest.mark.parametrize("count", SYLLABLES)
def test_syllables(count: int) -> None:
    assert {word: syllables(word) for word in SYLLABLES[count].split() if syllables(word) != count} == {}


@pytest.mark.parametrize(
    ("word", "count"),
    [("42", 1), ("well-known", 2), ("Café", 2), ("PEOPLE", 2), ("hmm", 1), ("x", 1), ("don’t", 1), ("doesn’t", 2)],
)
def test_syllables_of_odd_words(word: str, count: int) -> None:
    assert syllables(word) == count


def test_words() -> None:
    assert words("It's 3.5 well-known e-mails—really, “yes”!") == ["It's", "3.5", "well-known", "e-mails", "really", "yes"]
    assert words("?! ... — *") == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 1),
        ("no full stop at all", 1),
        ("The cat sat here. It was quite happy! Was it really so?", 3),
        ("It costs 3.50 dollars at www.shop.com today.", 1),
        ("Dr. Smith met Mr. J. Jones there. They talked a while.", 2),
        ("I. Am. Very. Simple. Now.", 1),  # fragments are no sentences
        ("Do the following:\n\n1. Take one cup.\n2. Add the water\n3. Stir it well", 4),
        ("- take one cup\n- add the water\n* stir it well", 3),
        ('He said "that is fine." Then he went away.', 2),
        ("What is that?!... I do not know.", 2),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert sentences(text) == count


def test_flesch_kincaid_by_hand() -> None:
    assert flesch_kincaid("The cat sat on the mat.") == pytest.approx(0.39 * 6 + 11.8 * 1 - 15.59)  # 6 words of 1 syllable
    text = "The scientist explained everything carefully. Nobody in the room asked a question."  # 12 words, 22 syllables, 2 sentences
    assert flesch_kincaid(text) == pytest.approx(0.39 * 6 + 11.8 * 22 / 12 - 15.59)
    with pytest.raises(ValueError, match="no words"):
        flesch_kincaid("...")


# --- Scorers ----------------------------------------------------------------------------------------------------------------------


def test_readability_values() -> None:
    plain = "The cat sat on the mat. It was a warm day."
    hard = "Notwithstanding considerable institutional opposition, administrators implemented comprehensive organisational restructuring."
    between = "The doctor asked about the pain. Nobody had an answer for him, so she began again with another question."
    grade = flesch_kincaid(between)
    assert 4.5 < grade < 8.5
    values = build_scorer("readability").score(answers(plain, hard, between))
    assert values == [1.0, 0.0, pytest.approx((9 - grade) / 5)]


def test_an_answer_that_is_none_never_scores_well() -> None:
    none = ["", " \n", "Yes.", "Go now", "!!! ???"]
    for name in ("readability", "length"):
        assert build_scorer(name).score(answers(*none)) == [0.0] * len(none)
    unreadable = ["go go go go go go", "Привет, как твои дела сегодня?", "你好 世界 今天"]
    assert build_scorer("readability").score(answers(*unreadable)) == [0.0] * len(unreadable)


def test_length() -> None:
    texts = ["a b c", "w " * 20, "w " * 60, "w " * 100, "w " * 500, "a b"]
    assert build_scorer("length").score(answers(*texts)) == [1.0, 1.0, 0.5, 0.0, 0.0, 0.0]
    assert build_scorer("length", low="10", high=30).score(answers("w " * 25)) == [0.25]
    with pytest.raises(ConfigError, match="low < high"):
        build_scorer("length", low=100)


def test_column() -> None:
    rows = [Answer("d.jsonl:1", "p", "t", {"toxicity": 0.25}), Answer("d.jsonl:2", "p", "t", {"tox": 1.0})]
    scorer = build_scorer("column", column="toxicity")
    assert scorer.score(rows[:1]) == [0.25] and scorer.title == "toxicity"
    with pytest.raises(DataError, match=r'd\.jsonl:2: no number in column "toxicity".*Known: tox'):
        scorer.score(rows)
    with pytest.raises(DataError, match=r"d\.jsonl:3: .* holds nan"):
        scorer.score([Answer("d.jsonl:3", "p", "t", {"toxicity": float("nan")})])
    with pytest.raises(ConfigError, match="name the column"):
        build_scorer("column")


def test_consensus_asks_for_textstat_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "textstat", None)
    with pytest.raises(UpoError, match=r'textstat is not installed.*pip install "upo\[rewards\]"'):
        build_scorer("readability", grade="consensus")


@pytest.mark.dev
@pytest.mark.filterwarnings("ignore")
def test_readability_against_textstat() -> None:
    """Tolerances are the differences found on 2,700 chat answers: textstat counts fewer syllables, and lists as one sentence."""
    textstat = pytest.importorskip("textstat")
    if not HH.exists():
        pytest.skip(f"{HH} is not there")
    texts = [
        row[side][-1]["content"] for row in map(json.loads, HH.read_text().splitlines()[:400]) for side in ("chosen", "rejected")
    ]
    texts = [text for text in texts if len(words(text)) >= 3]
    ours, theirs = np.array([flesch_kincaid(t) for t in texts]), np.array([textstat.flesch_kincaid_grade(t) for t in texts])
    assert 0.3 < np.median(ours - theirs) < 0.8
    assert np.median(np.abs(ours - theirs)) < 0.9
    clip = lambda grade: np.clip((9 - grade) / 5, 0, 1)  # noqa: E731
    assert np.corrcoef(clip(ours), clip(theirs))[0, 1] > 0.9
    consensus = build_scorer("readability", grade="consensus").score(answers(*texts[:5]))
    assert consensus == [pytest.approx(float(clip(textstat.text_standard(t, float_output=True)))) for t in texts[:5]]


def test_unknown_scorers_and_options_are_named() -> None:
    with pytest.raises(ConfigError, match=r'unknown scorer "readabilty".*"readability"'):
        build_scorer("readabilty")
    with pytest.raises(ConfigError, match=r'length has no option "hihg".*"high"'):
        build_scorer("length", hihg=3)
    for value in ("x", None, True, [1]):
        with pytest.raises(ConfigError, match="high must be a number"):
            build_scorer("length", high=value)
    with pytest.raises(ConfigError, match="grade must be"):
        build_scorer("readability", grade="fog")
    with pytest.raises(ConfigError, match="grade must be text"):
        build_scorer("readability", grade=3)


def test_every_scorer_says_what_it_is() -> None:
    for name, scorer in SCORERS.items():
        assert scorer.name == name and scorer.version and scorer.card.measures.endswith(".") and scorer.__doc__
        assert all((scorer.card.higher, scorer.card.speed, scorer.card.licence, scorer.card.offline))


# --- Code -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def code(tmp_path: Path):
    """`code(body)`: options of a python scorer whose function `f(prompts, completions)` has this body."""
    count = iter(range(100))

    def write(body: str) -> dict[str, str]:
        path = tmp_path / f"mine{next(count)}.py"
        path.write_text(f"def f(prompts, completions):\n    {body}\n")
        return {"function": f"{path}:f"}

    return write


def test_code_runs_only_when_allowed(tmp_path: Path) -> None:
    path = tmp_path / "evil.py"
    path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef f(p, c): return [0.0] * len(c)\n")
    with pytest.raises(ConfigError, match="--allow-code"):
        build_scorer("python", function=f"{path}:f")
    with pytest.raises(ConfigError, match=r"objective\.auxiliary\.rewards\.0: .*--allow-code"):
        validate_rewards(goals({"scorer": "python", "function": f"{path}:f"}))
    assert not (tmp_path / "ran").exists()
    build_scorer("python", allow_code=True, function=f"{path}:f")
    assert (tmp_path / "ran").exists()


def test_a_function_gets_prompts_and_completions_and_nothing_is_cached(code, cache: Path) -> None:
    scorer = build_scorer("python", True, **code("return [len(p) + 10 * len(c) for p, c in zip(prompts, completions)]"))
    assert scorer.score(answers("a", "bb", "a")) == [16.0, 26.0, 16.0]
    assert scorer.score([Answer("d:1", "p", "a"), Answer("d:2", "pp", "a")]) == [11.0, 12.0]
    assert not cache.exists()
    assert build_scorer("python", True, function="builtins:len").title == "len"  # MODULE:NAME


def test_numpy_results_are_numbers(code) -> None:
    assert build_scorer("python", True, **code("import numpy as np; return np.arange(len(completions), dtype=np.float32)")).score(
        answers("a", "b")
    ) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("return [0.0]", UpoError, "returned 1 number for 2 completions"),
        ("return 1.0", UpoError, "returned float instead of a list"),
        ("return None", UpoError, "returned NoneType instead of a list"),
        ("return [0.0, float('nan')]", DataError, r"d\.jsonl:2: scorer f returned nan"),
        ("return [float('inf'), 0.0]", DataError, r"d\.jsonl:1: scorer f returned inf"),
        ("return [0.0, None]", DataError, r"d\.jsonl:2: scorer f returned 'None', which is not a number"),
        ("return ['0.5', 0.0]", DataError, r"d\.jsonl:1: scorer f returned '0.5', which is not a number"),
        ("raise ValueError('too short\\nreally')", UpoError, r"raised ValueError: too short \(mine0\.py:2\)"),
    ],
)
def test_a_function_that_misbehaves(code, body: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        build_scorer("python", True, **code(body)).score(answers("a", "b"))
    assert "\n" not in str(caught.value)


def test_a_function_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "needs.py").write_text("import no_such_package_upo\ndef f(p, c): ...\n")
    (tmp_path / "empty.py").write_text("f = 3\n")
    cases = [
        ("f", ConfigError, r'no entry point "f"\..* For a file write FILE\.py:NAME'),
        ("f g", ConfigError, r'no entry point "f g"'),
        (":f", ConfigError, "FILE.py:NAME, MODULE:NAME or an entry point"),
        ("x.py:f()", ConfigError, "FILE.py:NAME"),
        (f"{tmp_path}/none.py:f", ConfigError, "no such file"),
        (
            "no_such_module_upo:f",
            ConfigError,
            r"no module named no_such_module_upo. For a file write its path: no_such_module_upo\.py:f",
        ),
        (f"{tmp_path}/broken.py:f", UpoError, "importing it raised SyntaxError"),
        (f"{tmp_path}/needs.py:f", UpoError, "importing it raised ModuleNotFoundError.*no_such_package_upo"),
        (f"{tmp_path}/empty.py:f", ConfigError, "has no function f"),
    ]
    for function, error, message in cases:
        with pytest.raises(error, match=message):
            build_scorer("python", True, function=function)


# --- Cache ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counting(TextScorer):
    """Remembers what it was asked."""

    factor: float = 1.0

    name: ClassVar[str] = "counting"
    version: ClassVar[str] = "1"
    card: ClassVar[Card] = Card("A fake.", None, "longer", "fast", "none", "yes")
    asked: ClassVar[list[str]] = []

    def __call__(self, answers: Sequence[Answer]) -> Sequence[float]:
        self.asked.extend(answer.text for answer in answers)
        return [self.factor * len(answer.text) for answer in answers]


@pytest.fixture
def counting() -> Counting:
    Counting.asked.clear()
    return Counting()


def test_each_text_is_scored_once_and_remembered(counting: Counting, cache: Path) -> None:
    assert counting.score(answers("a", "bb", "a")) == [1.0, 2.0, 1.0] and Counting.asked == ["a", "bb"]
    assert Counting().score(answers("ccc", "bb")) == [3.0, 2.0] and Counting.asked == ["a", "bb", "ccc"]
    assert counting.score([]) == []


def test_options_and_version_have_caches_of_their_own(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    counting.score(answers("a"))
    assert Counting(factor=2.0).score(answers("a")) == [2.0]
    monkeypatch.setattr(Counting, "version", "2")
    counting.score(answers("a"))
    assert Counting.asked == ["a", "a", "a"]


def test_a_damaged_cache_is_made_anew(counting: Counting, cache: Path) -> None:
    counting.score(answers("a"))
    (file,) = cache.glob("counting-*.sqlite")
    file.write_bytes(b"not a database" * 100)
    assert counting.score(answers("a")) == [1.0] and Counting.asked == ["a", "a"]
    assert counting.score(answers("a")) == [1.0] and Counting.asked == ["a", "a"]


def test_a_foreign_table_is_no_answer(counting: Counting, cache: Path) -> None:
    counting.score(answers("a"))
    (file,) = cache.glob("counting-*.sqlite")
    with sqlite3.connect(file) as database:
        database.execute("UPDATE scores SET score = 'x'")
    assert counting.score(answers("a")) == [1.0] and Counting.asked == ["a", "a"]


def test_without_a_cache_there_are_still_scores(counting: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UPO_CACHE", str(tmp_path / "file"))
    listener = Listener()
    assert counting.score(answers("a"), listener) == [1.0]
    assert len(listener.warned) == 1 and "UPO_CACHE" in listener.warned[0]


# --- The sum ----------------------------------------------------------------------------------------------------------------------


def test_rewards_are_the_weighted_sum_per_completion() -> None:
    examples = [
        example(1, "a b c", "w " * 60, quality=(0.5, 0.25)),
        example(2, "w " * 100, "w " * 20, "a b", kind="group", quality=(1.0, 2.0, 3.0)),
    ]
    listener = Listener()
    rewards = goals({"scorer": "length", "weight": 0.3}, {"scorer": "column", "column": "quality", "weight": -2.0})
    scored, _ = score_examples(examples, rewards, reporter=listener)
    assert scored[0].reward == pytest.approx((0.3 * 1.0 - 1.0, 0.3 * 0.5 - 0.5))
    assert scored[1].reward == pytest.approx((-2.0, 0.3 - 4.0, -6.0))
    assert scored[1].columns == {"quality": (1.0, 2.0, 3.0), "reward/length": (0.0, 1.0, 0.0), "reward/quality": (1.0, 2.0, 3.0)}
    assert examples[0].reward is None and scored[0].origin == "d.jsonl:1"
    assert "Reward length (weight 0.3): mean 0.500, from 0.000 to 1.000, over 5 completions." in listener.said
    assert listener.warned == []


def test_the_same_scorer_twice_keeps_both_columns() -> None:
    (scored,), _ = score_examples(
        [example(1, "w " * 30, "w " * 60)], goals({"scorer": "length"}, {"scorer": "length", "high": 40.0, "weight": 2.0})
    )
    assert scored.columns["reward/length"] == (0.875, 0.5) and scored.columns["reward/length#2"] == (0.5, 0.0)
    assert scored.reward == (1.875, 0.5)


def test_a_constant_reward_is_warned_about() -> None:
    listener = Listener()
    score_examples([example(1, "a b c", "d e f")], goals({"scorer": "length"}), reporter=listener)
    assert len(listener.warned) == 1 and "Reward length is 1 for every completion" in listener.warned[0]
    listener = Listener()
    rows = [example(1, "a b c", "w " * 100, q=(0.0, 1.0))]
    score_examples(rows, goals({"scorer": "length"}, {"scorer": "column", "column": "q"}), reporter=listener)
    assert listener.warned == ["The total reward is 1 for every completion, so it cannot steer the model."]


def test_bad_goals_name_their_key() -> None:
    with pytest.raises(ConfigError, match=r"objective\.auxiliary\.rewards\.1: scorer python runs code"):
        validate_rewards(goals({"scorer": "length"}, {"scorer": "python", "function": "mine.py:f"}))
    with pytest.raises(DataError, match=r"d\.jsonl:2: no number in column"):
        score_examples([example(1, "a", "b", q=(1.0, 2.0)), example(2, "a", "b")], goals({"scorer": "column", "column": "q"}))
    assert score_examples([], goals({"scorer": "length"}))[0] == []
