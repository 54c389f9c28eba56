"""What evaluations sample and decide while a run trains: goals on fresh answers, the best checkpoint, an early end; with stops and ranks."""

from __future__ import annotations

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from evaluation_cases import HELD_OUT, Listener, Loud
from fake_learner import UPO, FakeLearner, Rows, ThreadComm, Words, configure, pairs

from upo.backend import Sampling
from upo.config import EvaluationConfig
from upo.errors import ConfigError, RunError, UpoError
from upo.evaluation.goals import Fresh, Goal, questions_of, score_answers
from upo.rewards.length import Length
from upo.sampling import uniforms
from upo.training.keep import Metric, Watch
from upo.training.reporter import Silent
from upo.training.session import Session

LENGTH = {"scorer": "length", "low": 3, "high": 9}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def session(config, out, learner=None, rows=None, **options) -> Session:
    made = Session(config, out, learner=learner or FakeLearner(config), data=rows or Rows(pairs(14), HELD_OUT), **options)
    made.tokenizer = Words()  # type: ignore[assignment]
    return made


def evaluations(out) -> list[dict[str, Any]]:
    return [line for text in (out / "metrics.jsonl").read_text().splitlines() if (line := json.loads(text)).get("eval")]


# --- Fresh answers ----------------------------------------------------------------------------------------------------------------


class Away(Loud):
    def __call__(self, answers):
        raise UpoError("no answer from the judge within 20 s.")


def fresh(learner, goals, reporter=None, **options) -> Fresh:
    given = EvaluationConfig(**{"prompts": 5, "samples": 2, "max_tokens": 8, "temperature": 1.0, "top_p": 1.0, **options})
    return Fresh(learner, Words(), questions_of(HELD_OUT, given.prompts), given, goals, 3, reporter or Silent())


def by_hand(learner, samples: int = 2, most: int = 5, seed: int = 3) -> list[str]:
    """Answers sampled one by one from the table of the policy; sampling i is the i-th of prompts times samples."""
    policy = np.exp(learner._table())
    texts = []
    for i in range(most * samples):
        token, said = int(HELD_OUT[i // samples].prompt[-1]), []
        for u in uniforms(Sampling(max_tokens=8, seed=seed), i):
            token = next(t for t in range(12) if policy[token, : t + 1].sum() >= u)
            if token == 0:
                break
            said.append("abcdefghijkl"[token])
        texts.append(" ".join(said))
    return texts


def test_numbers_of_fresh_answers_are_means_over_all_of_them():
    learner = FakeLearner(configure())
    texts = by_hand(learner)
    assert len({t for t in texts if t}) > 5
    found = fresh(learner, [Goal("loud", Loud(), 2.0), Goal("length", Length(low=3, high=9), -0.5)])()
    loud = np.mean([t.split().count("d") for t in texts])
    short = np.mean([min((9 - len(t.split())) / 6, 1) if len(t.split()) >= 3 else 0 for t in texts])
    assert found["goal/loud"] == pytest.approx(loud, rel=1e-6) and loud > 0  # summed over ranks in float32
    assert found["goal/length"] == pytest.approx(short, rel=1e-6)
    assert found["goals"] == pytest.approx(2 * loud - 0.5 * short, rel=1e-6)
    assert found["answers/words"] == pytest.approx(np.mean([len(t.split()) for t in texts]), rel=1e-6)
    assert found["answers/empty"] == pytest.approx(np.mean([not t for t in texts]), rel=1e-6)
    assert set(found) == {"goal/loud", "goal/length", "goals", "answers/words", "answers/repetition", "answers/empty"}


@pytest.mark.parametrize("ranks", [2, 3, 16])
def test_ranks_share_the_answers_and_find_the_same_numbers(ranks):
    """16 ranks for 10 answers: some have none."""
    goals = [Goal("loud", Loud())]
    alone = fresh(FakeLearner(configure()), goals)()
    learners = [FakeLearner(configure(), comm) for comm in ThreadComm.make(ranks)]
    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(lambda learner: fresh(learner, goals)(), learners))
    assert found == [alone] * ranks


def test_a_judge_that_is_away_leaves_a_gap_and_a_warning():
    listener = Listener()
    found = fresh(FakeLearner(configure()), [Goal("loud", Away()), Goal("length", Length())], listener)()
    assert math.isnan(found["goal/loud"]) and math.isnan(found["goals"]) and math.isfinite(found["goal/length"])
    assert listener.warnings == ["Goal loud could not be scored on sampled answers, and is missing in this evaluation: no answer from the judge within 20 s."]


def test_questions_are_the_first_distinct_prompts():
    rows = [HELD_OUT[0], HELD_OUT[1], HELD_OUT[0], HELD_OUT[2]]
    assert [q.tokens.tolist() for q in questions_of(rows, 3)] == [HELD_OUT[i].prompt.tolist() for i in range(3)]


def test_scores_come_by_prompt_and_sample():
    found = score_answers([Goal("loud", Loud())], ["a", "b"], [["d", "d d"], ["", "x"]], Silent())
    np.testing.assert_array_equal(found["loud"], [[1, 2], [0, 0]])


def test_a_run_logs_goals_and_keeps_the_best_by_one(tmp_path):
    config = configure(
        train={"epochs": 4, "eval_every": 2, "keep_best": "goal/length", "keep_checkpoints": 1},
        evaluation={"prompts": 4, "samples": 3, "max_tokens": 9, "goals": [LENGTH]},
    )
    summary = session(config, tmp_path / "run").run()
    found = evaluations(tmp_path / "run")
    assert all({"goal/length", "goals", "answers/words", "perplexity"} <= set(line) for line in found)
    best = max((line for line in found if line["step"]), key=lambda line: (line["goal/length"], -line["step"]))
    assert len({line["goal/length"] for line in found}) >= 3 and best["step"] < 16
    assert summary["best"]["step"] == best["step"] and (tmp_path / "run" / "checkpoints" / f"step-{best['step']:06d}").is_dir()


def test_the_total_is_normalised_as_in_training(tmp_path):
    """`goal/length` is the score as it is, `goals` what training weighs: by the mean and deviation of the training rows, and clipped."""
    rewards = [{**LENGTH, "normalise": "zscore", "weight": 2.0, "clip": [-0.5, 1.5]}]
    config = configure({"preset": "upo", "auxiliary": {"rewards": rewards, "temperature": 0.1}}, evaluation={"prompts": 5, "samples": 2, "max_tokens": 8, "temperature": 1.0, "top_p": 1.0})
    rows = [replace(e, texts=("w " * (3 + i % 4), "w " * (7 + i % 3))) for i, e in enumerate(pairs(14))]
    session(config, tmp_path / "run", rows=Rows(rows, HELD_OUT)).run()
    ((mean, deviation),) = [r["mean_and_deviation"] for r in json.loads((tmp_path / "run" / "manifest.json").read_text())["rewards"]]
    first = evaluations(tmp_path / "run")[0]
    learner = FakeLearner(config)
    scores = [min((9 - len(t.split())) / 6, 1) if len(t.split()) >= 3 else 0 for t in by_hand(learner, seed=config.train.seed)]
    scaled = [(s - mean) / deviation for s in scores]
    assert min(scaled) < -0.5 and first["goal/length"] == pytest.approx(np.mean(scores), rel=1e-6)
    assert first["goals"] == pytest.approx(2 * np.mean(np.clip(scaled, -0.5, 1.5)), rel=1e-6)


def test_goals_of_an_evaluation_are_not_normalised():
    with pytest.raises(ConfigError, match=r"evaluation\.goals: normalise is fitted on scores of the training rows"):
        configure(evaluation={"prompts": 2, "goals": [{**LENGTH, "normalise": "zscore"}]})


def test_a_negative_weight_makes_lower_better(tmp_path):
    options = {"prompts": 4, "samples": 3, "max_tokens": 9, "goals": [{**LENGTH, "weight": -1.0}]}
    config = configure(train={"epochs": 4, "eval_every": 2, "keep_best": "goal/length"}, evaluation=options)
    summary = session(config, tmp_path / "run").run()
    assert summary["best"]["goal/length"] == min(line["goal/length"] for line in evaluations(tmp_path / "run") if line["step"])


def test_what_cannot_be_sampled_or_scored_is_refused(tmp_path):
    def refuse(match: str, rows: Rows | None = None, objective: Any = None, **sections: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            session(configure(objective, **sections), tmp_path / "run", rows=rows)
        assert not (tmp_path / "run").exists()

    refuse(r"^evaluation\.prompts: there are no held-out rows", Rows(pairs(14)), evaluation={"prompts": 2})
    refuse(r"^evaluation\.goals\.0: goal stands in the data", evaluation={"prompts": 2, "goals": [{"scorer": "column", "column": "goal"}]})
    watch = {"eval_every": 2, "keep_best": "goal/length"}
    refuse(r"train\.keep_best: .* no goal/length .*evaluation\.prompts", train=watch)
    refuse(r"Possible: .*goals, goal/length#?2?\.?$", train={**watch, "keep_best": "goal/lenth"}, evaluation={"prompts": 2, "goals": [LENGTH]})
    refuse(r"train\.early_stopping\.metric: .*train\.eval_every is 0", train={"early_stopping": {"metric": "loss"}})
    with pytest.raises(ConfigError, match=r'train\.early_stopping\.metric: no such metric of an evaluation\. Did you mean "accuracy"\?'):
        configure(train={"early_stopping": {"metric": "acuracy"}})


def test_a_goal_of_the_data_is_left_out_and_said(tmp_path):
    listener = Listener()
    session(configure(UPO, evaluation={"prompts": 2}), tmp_path / "run", reporter=listener).run()
    assert any("Goal goal stands in the data" in text for text in listener.infos)
    assert all("goals" not in line and "answers/words" in line for line in evaluations(tmp_path / "run"))


# --- Early end --------------------------------------------------------------------------------------------------------------------


def lines(*values: float | None) -> list[dict[str, Any]]:
    return [{"step": 10 * i, "m": value} for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "patience", "min_delta", "ends"),
    [
        ((9.0, 1.0, 2.0, 3.0), 1, 0.0, False),  # the one before training does not count
        ((0.0, 3.0, 2.0), 1, 0.0, True),
        ((0.0, 3.0, 3.0), 1, 0.0, True),  # equal is not better
        ((0.0, 3.0, 2.0, 2.5), 3, 0.0, False),
        ((0.0, 3.0, 2.0, 2.5, 2.9), 3, 0.0, True),
        ((0.0, 3.0, 2.0, 2.5, 3.1), 3, 0.0, False),
        ((0.0, 1.0, 1.3, 1.6, 1.9), 2, 0.5, False),  # 1.6 is better than 1.0 by more than 0.5
        ((0.0, 1.0, 1.3, 1.5), 2, 0.5, True),  # 1.5 is not
        ((0.0, 1.0, None, math.nan, 0.5), 2, 0.0, False),  # no value says nothing
        ((0.0, None, 1.0, None, 0.5, 0.2), 2, 0.0, True),
        ((0.0,), 1, 0.0, False),
    ],
)
def test_when_a_run_has_stalled(values, patience, min_delta, ends):
    assert Watch(stop=Metric("m", True), patience=patience, min_delta=min_delta).stalled(lines(*values)) is ends
    negated = [None if v is None else -v for v in values]
    assert Watch(stop=Metric("m", False), patience=patience, min_delta=min_delta).stalled(lines(*negated)) is ends
    assert Watch(stop=Metric("m", True), patience=patience, min_delta=min_delta).stalled(lines(*values)[::-1]) is ends, "the order of lines is their steps'"


def test_best_is_the_earliest_of_equals_and_not_before_training():
    watch = Watch(best=Metric("m", True))
    assert watch.best_of(lines(9.0, 1.0, 3.0, 3.0, None))["step"] == 20
    assert watch.best_of(lines(9.0)) is None and Watch().best_of(lines(1.0, 2.0)) is None


STOPPING = {"epochs": 8, "eval_every": 2, "save_every": 5, "keep_checkpoints": 9, "early_stopping": {"metric": "loss", "patience": 2}}


def turning(config, after: int = 9, comm: Any = None, die_at: int | None = None) -> FakeLearner:
    """After step `after` every update goes the wrong way."""
    learner = FakeLearner(config, comm)
    (name,) = [name for name in learner.adapter if "lora_A" in name]

    def before(step: int) -> None:
        if step == die_at:
            raise OSError("gone")
        learner.adapter.update({name: learner.adapter[name] * (1.0 if step < after else -1.0)})

    learner.before_step = before
    return learner


def expected_end(out) -> int:
    """Of patience 2: the second evaluation in a row that is not below the best before."""
    best, since = math.inf, 0
    for line in evaluations(out):
        if line["step"] > 0:
            best, since = (line["loss"], 0) if line["loss"] < best else (best, since + 1)
            if since == 2:
                return line["step"]
    raise AssertionError("it does not end early")


def timeless(out) -> list[dict[str, Any]]:
    times = {"seconds", "rows_per_s", "tokens_per_s", "peak_memory_gb", "mfu"}
    return [{k: v for k, v in json.loads(text).items() if k not in times} for text in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_ends_early_and_says_so(tmp_path):
    full = configure(train={k: v for k, v in STOPPING.items() if k != "early_stopping"})
    session(full, tmp_path / "full", turning(full)).run()
    end = expected_end(tmp_path / "full")
    config, out, listener = configure(train=STOPPING), tmp_path / "run", Listener()
    summary = session(config, out, turning(config), reporter=listener).run()
    assert 2 < end < 32
    assert timeless(out) == [line for line in timeless(tmp_path / "full") if line["step"] <= end]
    assert (summary["steps"], summary["ended_early"]) == (end, {"metric": "loss", "of_steps": 32})
    assert summary["rows"] == 14 * (end // 4) + 4 * (end % 4) and summary["eval"]["after"]["step"] == end
    assert (out / "checkpoints" / f"step-{end:06d}").is_dir() and (out / "adapter").is_dir()
    assert f"Stopped early after step {end} of 32: loss has not become better in 2 evaluations in a row." in listener.infos


def test_it_ends_at_the_same_step_after_a_stop(tmp_path):
    config = configure(train=STOPPING)
    session(config, tmp_path / "whole", turning(config)).run()
    end = expected_end(tmp_path / "whole")
    for die_at in (3, end - 3, end - 1):
        out = tmp_path / f"run{die_at}"
        with pytest.raises(OSError, match="gone"):
            session(config, out, turning(config, die_at=die_at)).run()
        session(config, out, turning(config), resume=True).run()
        assert timeless(out) == timeless(tmp_path / "whole")
        assert json.loads((out / "summary.json").read_text())["steps"] == end


def test_an_ended_run_goes_on_with_more_patience_only(tmp_path):
    config, out = configure(train=STOPPING), tmp_path / "run"
    end = session(config, out, turning(config)).run()["steps"]
    with pytest.raises(RunError, match=r"ended early, as loss had not become better in 2 evaluations .* raise train\.early_stopping\.patience"):
        session(config, out, turning(config), resume=True)
    patient = configure(train={**STOPPING, "early_stopping": {"metric": "loss", "patience": 50}})
    summary = session(patient, out, turning(patient), resume=True).run()
    assert summary["steps"] == 32 > end and "ended_early" not in summary


def test_ranks_end_together(tmp_path):
    config = configure(
        train={**STOPPING, "early_stopping": {"metric": "goal/length", "patience": 2}}, evaluation={"prompts": 5, "samples": 3, "max_tokens": 9, "goals": [LENGTH]}
    )
    alone = session(config, tmp_path / "alone", turning(config)).run()
    learners = [turning(config, comm=comm) for comm in ThreadComm.make(2)]
    with ThreadPoolExecutor(2) as pool:
        summaries = list(pool.map(lambda learner: session(config, tmp_path / "run", learner).run(), learners))
    assert alone["steps"] < 32
    assert [s["steps"] for s in summaries] == [alone["steps"]] * 2
    found, expected = timeless(tmp_path / "run"), timeless(tmp_path / "alone")
    for line in (*found, *expected):  # two ranks cut steps into other micro-batches
        line.pop("slots"), line.pop("padding")
    assert found == expected
