"""The bundled pairs: what the data card says of them, recomputed; and the rules they are made by."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from upo.backend import Sampling
from upo.data.read import read
from upo.quickstart import make_data
from upo.quickstart.pairs import Pair, choose_pairs, opens_with_comma
from upo.quickstart.recipe import HELDOUT, TRAIN, prompts, recipe
from upo.rewards.english import words
from upo.rewards.readability import Readability
from upo.training.reporter import Silent


def pairs(split: str) -> list[Pair]:
    rows = [json.loads(line) for line in (TRAIN if split == "train" else HELDOUT).read_text(encoding="utf-8").splitlines()]
    for row in rows:
        assert [list(row), *[[m["role"] for m in row[k]] for k in row]] == [["prompt", "chosen", "rejected"], ["user"], ["assistant"], ["assistant"]]
    return [Pair(*(row[k][0]["content"] for k in ("prompt", "chosen", "rejected"))) for row in rows]


def test_prompts_are_distinct_and_none_is_in_both_splits() -> None:
    train, held = prompts("train"), prompts("heldout")
    plain = {re.sub(r"\W+", " ", p.lower()).strip() for p in train + held}
    assert len(plain) == len(train) + len(held)


def test_counts_and_prompts_of_the_pairs() -> None:
    train, held = pairs("train"), pairs("heldout")
    assert (len(train), len(held)) == (120, 80)
    assert (len({p.prompt for p in train}), len({p.prompt for p in held})) == (61, 40)
    assert {p.prompt for p in train} <= set(prompts("train")) and {p.prompt for p in held} <= set(prompts("heldout"))
    texts = [t for p in train + held for t in (p.chosen, p.rejected)]
    assert len(set(texts)) == len(texts)  # the pairs are disjoint


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_label_follows_its_rule_and_says_nothing_about_readability(split: str) -> None:
    found = pairs(split)
    assert all(opens_with_comma(p.chosen) and not opens_with_comma(p.rejected) for p in found)
    sides = [[t for p in found for t in (p.chosen, p.rejected)]][0]
    reward = np.array([Readability().one(t) for t in sides])
    label = np.tile([1.0, -1.0], len(found))
    assert abs(np.corrcoef(label, reward)[0, 1]) < 0.1
    assert abs(np.corrcoef(label, [len(words(text)) for text in sides])[0, 1]) < 0.1
    # The same over differences, each pair in an order that does not depend on its label.
    sign = np.where([p.chosen < p.rejected for p in found], 1.0, -1.0)
    assert abs(np.corrcoef(sign, sign * (reward[::2] - reward[1::2]))[0, 1]) < 0.1


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_completions_end_where_a_turn_may_end(split: str) -> None:
    for pair in pairs(split):
        for text in (pair.chosen, pair.rejected):
            assert text == text.strip() and len(words(text)) >= make_data.SHORTEST


def test_goal_can_be_learned_from_the_rows() -> None:
    reward = np.array([Readability().one(t) for p in pairs("train") for t in (p.chosen, p.rejected)])
    assert 0.1 < reward.mean() < 0.5 and reward.std() > 0.2
    assert (reward == 0).mean() < 0.7


def test_rows_are_read_as_preference_pairs() -> None:
    assert sum(isinstance(record, dict) for _, record in read(TRAIN)) == 120


def test_recipe_is_a_valid_configuration_with_its_places_filled() -> None:
    config = recipe("some/model", "torch", seed=3, steps=7, overrides=["objective.auxiliary.gamma=4"])
    assert (config.model, config.backend, config.train.seed, config.train.steps) == ("some/model", "torch", 3, 7)
    assert config.objective.auxiliary is not None and config.objective.auxiliary.gamma == 4
    assert (config.data.train, config.data.eval) == (str(TRAIN), str(HELDOUT))
    full = recipe("some/model")
    assert full.objective.auxiliary is not None
    assert (full.train.steps, full.train.batch_size, full.optimizer.lr, full.optimizer.warmup_steps) == (60, 4, 5e-4, 5)
    assert (full.objective.auxiliary.gamma, full.objective.auxiliary.temperature, full.objective.auxiliary.actor_warmup_steps) == (0.3, 5, 0)
    assert full.objective.preference[0].loss == "kto"


def test_a_comma_counts_in_the_first_sentence_only() -> None:
    assert all(map(opens_with_comma, ["Well, yes.", "Red, blue", "Ask Mr. Smith, he knows. Or not."]))
    assert not any(map(opens_with_comma, ["Yes. Well, no.", "Apples", "", "1. The first is good. Then, stop."]))


def test_pairs_are_disjoint_and_the_chosen_answer_opens_with_a_comma() -> None:
    texts = ["A, b.", "Sky.", "C, d.", "Blue.", "E, f."]
    found = choose_pairs([("q", texts), ("no comma", ["Sky.", "Blue."])], 3, len)
    assert len(found) == 2 and {p.prompt for p in found} == {"q"}  # two answers without a comma: two pairs
    assert all(opens_with_comma(p.chosen) and not opens_with_comma(p.rejected) for p in found)
    used = [t for p in found for t in (p.chosen, p.rejected)]
    assert len(set(used)) == 4
    assert len(choose_pairs([("q", texts)], 1, len)) == 1


def test_selection_keeps_the_goal_balanced_over_prompts() -> None:
    goal = lambda text: float("good" in text)  # noqa: E731
    either = ("b", ["Oh, good.", "Oh, bad.", "It is good.", "It is bad."])  # as wide either way: balance + 1 or - 1
    assert choose_pairs([("a", ["Oh, good.", "It is bad."]), either], 1, goal)[1] == Pair("b", "Oh, bad.", "It is good.")
    assert choose_pairs([("a", ["Oh, bad.", "It is good."]), either], 1, goal)[1] == Pair("b", "Oh, good.", "It is bad.")


def test_selection_is_wide_but_as_good_as_the_answers_are() -> None:
    goal = lambda text: {"best": 1.0, "good": 0.5}.get(text.split()[1], 0.0)  # noqa: E731
    texts = ["Oh, best.", "Oh, good.", "Oh, bad.", "It worse.", "It good.", "It awful."]
    texts = [text.replace(".", " one.") for text in texts]
    found = choose_pairs([("q", texts)], 2, goal)
    values = [goal(t) for p in found for t in (p.chosen, p.rejected)]
    assert 1.0 in values  # the spread is taken ...
    assert abs(sum(values) / 4 - sum(map(goal, texts)) / 6) <= 0.1  # ... and the mean, 1/3, is kept


class Canned:
    """A learner that answers its samples of a prompt with texts given, whatever the prompt."""

    texts = ("One is a good number of words. And", "Too short.", "One is a good number of words. Or", "This answer has ended by itself")

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def generate(self, prompts: list[np.ndarray], sampling: Sampling) -> list[np.ndarray]:
        self.seeds.append(sampling.seed)
        assert [int(p[0]) for p in prompts] == sorted(int(p[0]) for p in prompts)  # the samples of a prompt are neighbours
        return [np.array([ord(c) for c in self.texts[i % 4]], np.int32) for i in range(len(prompts))]


class Letters:
    def prompt_ids(self, messages: list[dict[str, str]]) -> np.ndarray:
        return np.array([ord(messages[0]["content"])], np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        return "".join(map(chr, tokens))


def test_sampling_keeps_distinct_answers_with_an_honest_end() -> None:
    limit = len(Canned.texts[0])  # an answer this long was cut, a shorter one ended by itself
    learner, questions = Canned(), [chr(ord("a") + i) for i in range(make_data.CHUNK + 1)]
    found = make_data.sample(learner, Letters(), questions, Sampling(max_tokens=limit - 1, seed=5), Silent())  # type: ignore[arg-type]
    assert found == [["One is a good number of words.", "This answer has ended by itself"]] * len(questions)
    assert learner.seeds == [5, 5 + make_data.CHUNK]
