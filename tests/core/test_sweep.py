"""Sweeps: the Pareto front by definition, points and their names, caches used twice, failures, and going on."""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_cases import HELD_OUT, Listener
from fake_learner import FakeLearner, Rows, Words, configure, pairs

from upo.errors import ConfigError, NonFiniteError, RunError
from upo.rewards.length import Length
from upo.sweep.front import pareto_front
from upo.sweep.points import read_sweep
from upo.sweep.run import run_sweep
from upo.training.session import Session

NAN = float("nan")


# --- The front --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(1, 2), (2, 1), (0, 0)], [True, True, False]),
        ([(1, 1), (1, 1), (1, 0)], [True, True, False]),  # equal points share the front
        ([(1, 1), (2, 1)], [False, True]),  # better in one, equal in the other
        ([(3,), (5,), (5,), (4,)], [False, True, True, False]),  # one objective: its largest
        ([(1, NAN), (0, 0)], [False, True]),  # what cannot be compared neither stands nor beats
        ([(math.inf, 1), (0, 0)], [False, True]),
        ([(NAN, NAN)], [False]),
        ([(1, 2, 3)], [True]),
        ([], []),
        ([(), ()], [True, True]),
    ],
)
def test_front_of_known_points(points, front):
    assert pareto_front(points) == front


def test_front_of_many_points_is_what_the_definition_says():
    """On a coarse grid, so that ties are common: p is on it if no q has q >= p everywhere and q != p."""
    points = np.random.default_rng(0).integers(0, 5, (60, 3)).astype(float)
    expected = [not any((q >= p).all() and (q != p).any() for q in points) for p in points]
    assert pareto_front(points.tolist()) == expected and 0 < sum(expected) < 60
    order = np.random.default_rng(1).permutation(60)
    assert pareto_front(points[order].tolist()) == [expected[i] for i in order]


# --- Points -----------------------------------------------------------------------------------------------------------------------


def write(tmp_path, text: str) -> Path:
    (tmp_path / "sweep.yaml").write_text(text)
    return tmp_path / "sweep.yaml"


BASE = "base: {model: m, data: {train: rows.jsonl}, objective: {preference: dpo}}\n"


def test_a_grid_and_a_list_are_combined(tmp_path):
    text = BASE + "grid: {optimizer.lr: [1e-4, 2e-4], train.seed: [0, 1]}\npoints: [{objective.preference: kto}, {objective.preference.loss: ipo, name: mine}]\n"
    points = read_sweep(write(tmp_path, text), ["train.batch_size=3"]).points
    tails = [f"lr={lr},seed={seed}" for lr, seed in itertools.product(("1e-4", "2e-4"), (0, 1))]
    assert [p.name for p in points] == [f"{head},{tail}" for head in ("preference=kto", "mine") for tail in tails]
    found = [(p.config.objective.preference[0].loss, p.config.optimizer.lr, p.config.train.seed) for p in points]
    assert found == list(itertools.product(("kto", "ipo"), (1e-4, 2e-4), (0, 1)))
    assert all(p.config.train.batch_size == 3 for p in points)


def test_names_are_as_short_as_they_are_clear(tmp_path):
    text = BASE + "points: [{objective.preference: {loss: dpo, beta: 0.2}}, {optimizer.lr: 0.1, objective.auxiliary.value.lr: 0.2, objective.preset: upo, objective.auxiliary.rewards: length}]\n"
    names = [p.name for p in read_sweep(write(tmp_path, text)).points]
    assert names[0] == "preference=loss-dpo-beta-0.2"
    assert names[1] == "optimizer.lr=0.1,value.lr=0.2,preset=upo,rewards=length"
    long = read_sweep(write(tmp_path, BASE + f"grid: {{model: [{'a' * 100}, {'a' * 99}b]}}\n")).points
    assert len({p.name for p in long}) == 2 and all(len(p.name) <= 80 for p in long)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("grid: {train.seed: [1]}\n", "base: name a configuration file"),
        (BASE, "no points"),
        (BASE + "grd: {}\n", r'sweep\.yaml:2: grd: unknown key of a sweep\. Did you mean "grid"\?'),
        (BASE + "grid: {train.seed: 1}\n", r"grid\.train\.seed: must be a list"),
        (BASE + "points: {train.seed: 1}\n", "points: must be a list of mappings"),
        (BASE + "points: [{train.seed: 1}]\ngrid: {train.seed: [2]}\n", r"points\.0: train\.seed is in the grid too"),
        (BASE + "points: [{train.seed: 1}, {train.seed: 1}]\n", "the point seed=1 is the same as another"),
        (BASE + "points: [{train.seed: 1, name: a}, {train.seed: 2, name: a}]\n", "the point a is named like another"),
        (BASE + "grid: {train.sed: [1]}\n", r'point sed=1: --set train\.sed: unknown key\. Did you mean "seed"\?'),
        (BASE + "grid: {optimizer.lr: [-1, 1e-4, -2]}\n", r"(?s)point lr=-1: .*must be above.*point lr=-2: "),
        (BASE + "grid: {train.seed: [1]}\nfront: [acuracy]\n", r'front: no such metric of an evaluation\. Did you mean "accuracy"\?'),
        (BASE + "grid: {train.seed: [1]}\nfront: accuracy\n", "front: must be a list"),
        ("base: none.yaml\ngrid: {train.seed: [1]}\n", r"none\.yaml: no such file"),
    ],
)
def test_what_is_no_sweep(tmp_path, text, match):
    with pytest.raises(ConfigError, match=match):
        read_sweep(write(tmp_path, text))


# --- Runs -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Trainer:
    """Trains a fake learner; remembers the runs, and can fail at one of them."""

    def __init__(self, fail: str | None = None, error: BaseException | None = None) -> None:
        self.fail, self.error = fail, error
        self.ran: list[tuple[str, bool]] = []
        self.learners: list[FakeLearner] = []

    def __call__(self, config, out, *, resume, allow_code, reporter) -> dict[str, Any]:
        self.ran.append((out.name, resume))
        learner = FakeLearner(config)
        self.learners.append(learner)
        session = Session(config, out, learner=learner, data=Rows(pairs(14), HELD_OUT), resume=resume, reporter=reporter)
        session.tokenizer = Words()  # type: ignore[assignment]
        if out.name == self.fail:

            def stop(step: int) -> None:
                if step == 2 and self.error is not None:
                    raise self.error

            learner.before_step = stop
        return session.run()


ROW = 2  # completions
UPO = {"preset": "upo", "auxiliary": {"rewards": [{"scorer": "length", "low": 3, "high": 9}]}}


def a_sweep(tmp_path, extra: str = "", gammas: str = "[0.5, 3.0, 20.0]"):
    base = configure(UPO, train={"epochs": 2, "save_every": 2, "micro_batch_tokens": 1}, evaluation={"prompts": 5, "samples": 2, "max_tokens": 9})
    (tmp_path / "base.yaml").write_text(base.dump())
    return read_sweep(write(tmp_path, f"base: {tmp_path}/base.yaml\ngrid: {{objective.auxiliary.gamma: {gammas}}}\n{extra}"))


def test_references_and_rewards_are_scored_once(tmp_path, monkeypatch):
    scored: list[int] = []
    score = Length.__call__
    monkeypatch.setattr(Length, "__call__", lambda self, answers: (scored.append(len(answers)), score(self, answers))[1])
    trainer = Trainer()
    result = run_sweep(a_sweep(tmp_path, gammas="[0.5, 3.0]"), tmp_path / "out", reporter=Listener(), run=trainer)
    first, second = (learner.scored for learner in trainer.learners)
    assert first > 0 and second == 2 * ROW, "a row of each split is scored again, and compared with the cache"
    alone = len(scored)
    run_sweep(a_sweep(tmp_path, gammas="[0.5, 3.0, 3.5]"), tmp_path / "out", reporter=Listener(), run=trainer)
    texts = {"c", "r"}
    assert scored[0] == len(texts), "the rows' texts, by the first point"
    assert alone > 0 and [p["status"] for p in result["points"]] == ["done", "done"]
    assert [name for name, _ in trainer.ran] == ["gamma=0.5", "gamma=3.0", "gamma=3.5"], "what is done is not run again"
    assert trainer.learners[-1].scored == second


def test_the_result_is_on_disk_with_its_front(tmp_path):
    result = run_sweep(a_sweep(tmp_path), tmp_path / "out", reporter=Listener(), run=Trainer())
    assert json.loads((tmp_path / "out" / "sweep.json").read_text()) == result
    assert result["goals"] == ["accuracy", "goal/length"]
    for point in result["points"]:
        last = [json.loads(t) for t in (tmp_path / "out" / point["name"] / "metrics.jsonl").read_text().splitlines()][-1]
        assert last["eval"] and point["metrics"]["goal/length"] == last["goal/length"] and point["metrics"]["accuracy"] == last["accuracy"]
        assert point["set"] == {"objective.auxiliary.gamma": float(point["name"].removeprefix("gamma="))}
    values = [(p["metrics"]["accuracy"], p["metrics"]["goal/length"]) for p in result["points"]]
    expected = [not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in values) for p in values]
    assert [p["front"] for p in result["points"]] == expected and any(expected)


def test_metrics_where_less_is_more(tmp_path):
    result = run_sweep(a_sweep(tmp_path, "front: [perplexity]\n"), tmp_path / "out", reporter=Listener(), run=Trainer())
    values = [p["metrics"]["perplexity"] for p in result["points"]]
    assert len(set(values)) == 3 and [p["front"] for p in result["points"]] == [v == min(values) for v in values]


@pytest.mark.parametrize("error", [NonFiniteError("step 3: not finite."), MemoryError("out of memory")], ids=["input", "machine"])
def test_a_point_that_fails_does_not_stop_the_others(tmp_path, error):
    sweep, listener = a_sweep(tmp_path), Listener()
    result = run_sweep(sweep, tmp_path / "out", reporter=listener, run=Trainer("gamma=3.0", error))
    assert [p["status"] for p in result["points"]] == ["done", "failed", "done"]
    failed = result["points"][1]
    assert ("not finite" in failed["error"] or failed["error"] == "MemoryError: out of memory") and failed["metrics"] == {} and not failed["front"]
    assert any(text.startswith("gamma=3.0 failed: ") for text in listener.warnings)
    again = Trainer()
    result = run_sweep(sweep, tmp_path / "out", reporter=listener, run=again)
    assert again.ran == [("gamma=3.0", True)] and [p["status"] for p in result["points"]] == ["done"] * 3


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path):
    sweep = a_sweep(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, tmp_path / "out", reporter=Listener(), run=Trainer("gamma=3.0", KeyboardInterrupt()))
    assert [p["status"] for p in json.loads((tmp_path / "out" / "sweep.json").read_text())["points"]] == ["done", "pending", "pending"]
    again = Trainer()
    result = run_sweep(sweep, tmp_path / "out", reporter=Listener(), run=again)
    assert again.ran == [("gamma=3.0", True), ("gamma=20.0", False)] and all(p["status"] == "done" for p in result["points"])
    whole = run_sweep(sweep, tmp_path / "whole", reporter=Listener(), run=Trainer())
    for a, b in zip(result["points"], whole["points"], strict=True):
        assert {k: a["metrics"][k] for k in ("loss", "goal/length", "kl")} == {k: b["metrics"][k] for k in ("loss", "goal/length", "kl")}


def test_results_of_another_configuration_are_not_taken_for_these(tmp_path):
    run_sweep(a_sweep(tmp_path), tmp_path / "out", reporter=Listener(), run=Trainer())
    (tmp_path / "base.yaml").write_text((tmp_path / "base.yaml").read_text().replace("lr: 0.5", "lr: 0.25"))
    changed = read_sweep(tmp_path / "sweep.yaml")
    trainer = Trainer()
    with pytest.raises(RunError, match=r"gamma=0\.5 was trained with another configuration \(optimizer\.lr: 0\.5 there, 0\.25 now\)"):
        run_sweep(changed, tmp_path / "out", reporter=Listener(), run=trainer)
    assert trainer.ran == []
