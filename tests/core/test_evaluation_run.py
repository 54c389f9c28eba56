"""The evaluation of a run against what its own evaluation lines say, with a fake learner."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from evaluation_cases import HELD_OUT, Listener, Loud
from fake_learner import FakeLearner, Rows, Words, configure, pairs

from upo.adapters import read_adapter
from upo.backend import Sampling
from upo.errors import ModelError, RunError, UpoError
from upo.evaluation.goals import Goal, questions_of
from upo.evaluation.judge import ScorerJudge
from upo.evaluation.run import Questions, evaluate_target, median_sample
from upo.evaluation.target import target_of_model, target_of_run
from upo.training.reporter import Silent
from upo.training.session import Session


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def run(tmp_path):
    """Eight steps of DPO, evaluated every two, the best by loss kept."""
    config = configure(optimizer={"lr": 4.0}, train={"eval_every": 2, "keep_best": "loss", "save_every": 3, "keep_checkpoints": 9})
    Session(config, tmp_path / "run", learner=FakeLearner(config), data=Rows(pairs(14), HELD_OUT)).run()
    return tmp_path / "run"


def lines(run) -> dict[int, dict]:
    return {line["step"]: line for text in (run / "metrics.jsonl").read_text().splitlines() if (line := json.loads(text)).get("eval")}


def load(target) -> FakeLearner:
    """What a backend's `load` does: the policy is the configuration's start adapter."""
    learner = FakeLearner(target.config)
    learner.load_state({**learner.state(), "adapter": read_adapter(target.adapter).arrays})
    return learner


QUESTIONS = Questions(questions_of(HELD_OUT, 5), 3, Sampling(8, 1.0, 1.0, 4), [Goal("loud", Loud(), 0.5)])


def evaluate(target, questions=QUESTIONS, rows=HELD_OUT, **options):
    learner = load(target)
    return learner, evaluate_target(target, learner, Words(), "torch", rows, questions, options.get("reporter", Silent()))


def test_a_run_before_and_after(run):
    """The numbers of the evaluation lines, found another way: by the adapter on disk, from log-probs alone."""
    target = target_of_run(run, "latest", {}, Silent())
    learner, result = evaluate(target)
    assert (target.step, target.checkpoint, target.adapter) == (8, "latest", run / "adapter")
    for name in ("accuracy", "margin", "kl", "perplexity"):
        assert result[name]["before"] == pytest.approx(lines(run)[0][name], rel=1e-6, abs=1e-9)
        assert result[name]["after"] == pytest.approx(lines(run)[8][name], rel=1e-6) and result[name]["after"] != result[name]["before"]
    for name in ("accuracy", "margin"):
        change = result[name]["change"]
        assert change["mean"] == pytest.approx(result[name]["after"] - result[name]["before"], rel=1e-6) and change["low"] <= change["mean"] <= change["high"]
    np.testing.assert_array_equal(*(list(arrays.values())[1] for arrays in (learner.state()["adapter"], read_adapter(run / "adapter").arrays)))


def test_goals_and_samples_are_those_of_the_two_policies(run):
    target = target_of_run(run, "latest", {}, Silent())
    learner, result = evaluate(target)
    fresh = FakeLearner(target.config)
    for when, policy in (("before", fresh), ("after", learner)):
        said = policy.generate([q.tokens for q in QUESTIONS.asked for _ in range(3)], QUESTIONS.sampling)
        texts = [Words().decode(tokens) for tokens in said]
        assert [text for sample in result["samples"] for text in sample[when]] == texts
        assert result["goals"]["loud"][when] == pytest.approx(np.mean([t.split().count("d") for t in texts]))
        assert result["answers"]["words"][when] == pytest.approx(np.mean([len(t.split()) for t in texts]))
    goal = result["goals"]["loud"]
    assert goal["weight"] == 0.5 and goal["change"]["mean"] == pytest.approx(goal["after"] - goal["before"]) and goal["after"] > goal["before"]
    assert result["win_rate"] is None and result["rows"] == 6 and result["prompts"] == 5 and result["samples_per_prompt"] == 3


def test_checkpoints_by_name(run):
    best = min((line for line in lines(run).values() if line["step"]), key=lambda line: (line["loss"], line["step"]))["step"]
    for name, step in (("best", best), ("step-3", 3), ("step-000006", 6), ("6", 6)):
        target = target_of_run(run, name, {}, Silent())
        assert target.step == step and target.adapter == run / "checkpoints" / f"step-{step:06d}"
    target = target_of_run(run, "best", {}, Silent())
    assert evaluate(target)[1]["accuracy"]["after"] == pytest.approx(lines(run)[best]["accuracy"])
    with pytest.raises(RunError, match=r"has no step-000007\. There are: .*step-000003"):
        target_of_run(run, "step-7", {}, Silent())
    with pytest.raises(RunError, match="write latest, best or step-N"):
        target_of_run(run, "newest", {}, Silent())


def test_an_unfinished_run_is_taken_at_its_newest_checkpoint(run):
    (run / "summary.json").unlink()
    shutil.rmtree(run / "adapter")
    assert target_of_run(run, "latest", {}, Silent()).step == 8
    with pytest.raises(RunError, match=r"--checkpoint best: .* train\.keep_best"):
        target_of_run(run, "best", {}, Silent())
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RunError, match="neither a result nor a checkpoint yet"):
        target_of_run(run, "latest", {}, Silent())


def test_a_run_from_an_adapter_is_compared_with_that(run, tmp_path):
    """Of step 3 when it began; that is `start` of its reference, while the adapter loaded is the trained one."""
    start = str(run / "checkpoints" / "step-000003")
    shutil.copytree(run, tmp_path / "second")
    (tmp_path / "second" / "config.yaml").write_text(configure(adapter={"start": start}, reference="start").dump())
    target = target_of_run(tmp_path / "second", "latest", {}, Silent())
    assert target.config.adapter.start == str(tmp_path / "second" / "adapter") and target.config.reference == start
    learner = load(target)
    before, after = target.before(learner), learner.state()["adapter"]
    for name, array in read_adapter(start).arrays.items():
        np.testing.assert_array_equal(before[name], array)
    assert any((before[name] != after[name]).any() for name in after)
    (tmp_path / "second" / "config.yaml").write_text(configure(adapter={"start": str(run / "adapter")}).dump())
    assert target_of_run(tmp_path / "second", "latest", {}, Silent()).config.reference == "base"


def test_prompts_alone_and_rows_alone(run):
    target = target_of_run(run, "latest", {}, Silent())
    _, result = evaluate(target, rows=[])
    assert result["rows"] == 0 and "accuracy" not in result and "loud" in result["goals"]
    _, result = evaluate(target, Questions([], 1, Sampling()))
    assert (result["goals"], result["win_rate"], result["samples"]) == ({}, None, []) and result["accuracy"]["before"] == 0.5


def test_a_judge_and_a_goal_that_fails(run):
    class Gone(Loud):
        def __call__(self, answers):
            raise UpoError("scorer gone: no answer.")

    listener = Listener()
    questions = Questions(QUESTIONS.asked, 3, QUESTIONS.sampling, [Goal("gone", Gone()), Goal("loud", Loud())], ScorerJudge(Loud(), Silent()))
    _, result = evaluate(target_of_run(run, "latest", {}, Silent()), questions, reporter=listener)
    assert list(result["goals"]) == ["loud"]
    assert listener.warnings[0] == "Goal gone could not be scored and is left out: scorer gone: no answer."
    counts = {"wins": 0, "losses": 0, "ties": 0}
    for sample in result["samples"]:
        for old, new in zip(sample["before"], sample["after"], strict=True):
            more = new.split().count("d") - old.split().count("d")
            counts["wins" if more > 0 else "losses" if more < 0 else "ties"] += 1
    assert {name: result["win_rate"][name] for name in counts} == counts and counts["wins"] > counts["losses"]


def test_empty_answers_are_told_and_kept(run):
    class Mute(FakeLearner):
        def generate(self, prompts, sampling):
            return [np.zeros(0, np.int32) if i % 3 == 0 else tokens for i, tokens in enumerate(super().generate(prompts, sampling))]

    target, listener = target_of_run(run, "latest", {}, Silent()), Listener()
    learner = Mute(target.config)
    learner.load_state({**learner.state(), "adapter": read_adapter(target.adapter).arrays})
    result = evaluate_target(target, learner, Words(), "torch", [], QUESTIONS, listener)
    texts = [text for sample in result["samples"] for text in sample["after"]]
    assert texts.count("") == result["answers"]["empty"]["after"] >= 5 and len(texts) == 15
    assert f"{texts.count('')} of 15 answers after are empty. They are kept, and count in every mean as the scorers see them." in listener.warnings
    assert result["goals"]["loud"]["after"] == pytest.approx(sum(text.split().count("d") for text in texts) / 15)


def test_an_adapter_that_names_no_model(tmp_path):
    with pytest.raises(ModelError, match="no such adapter folder"):
        target_of_model(None, tmp_path / "none", {})


def test_the_sample_shown_is_the_median_one():
    samples = [{"before": ["a"], "after": ["a b c d"]}, {"before": ["a b"], "after": ["a"]}, {"before": ["a"], "after": ["a b"]}]
    assert median_sample(samples) is samples[2]  # changes 3, -1, 1
