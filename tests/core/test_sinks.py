"""Trackers beside metrics.jsonl, with stand-in modules: what they are told, that none of them ends a run, and that a resumed run finds its own."""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stdout
from types import ModuleType
from typing import Any

import pytest
from fake_learner import FakeLearner, Rows, configure, pairs

from upo.errors import ConfigError
from upo.training.reporter import Silent
from upo.training.session import Session
from upo.training.sinks import numbers


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("UPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Listener(Silent):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


class Tracker(ModuleType):
    """Stands in for trackio and wandb: keeps what it is told; `fail` names the call that raises."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, Any], Any]] = []
        self.defined: list[Any] = []
        self.finished: list[Any] = []
        self.summary: dict[str, Any] = {}
        self.fail: str | None = None

    def init(self, **options: Any) -> Tracker:
        self._called("init")
        print("* a line on stdout")
        self.inits.append(options)
        return self

    def log(self, metrics: dict[str, Any], step: Any = None) -> None:
        self._called("log")
        self.logged.append((metrics, step))

    def define_metric(self, *arguments: Any, **options: Any) -> None:
        self.defined.append((arguments, options))

    def finish(self, **options: Any) -> None:
        self._called("finish")
        self.finished.append(options)

    def _called(self, name: str) -> None:
        if name == self.fail:
            raise RuntimeError(f"{name} went wrong\nand more")


@pytest.fixture(params=["trackio", "wandb"])
def tracker(request, monkeypatch) -> Tracker:
    module = Tracker(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def config_for(tracker: Tracker, **options: Any):
    return configure({"preference": {"loss": "dpo"}}, train={"batch_size": 4, "epochs": 1, "save_every": 2}, log={tracker.__name__: options})


def session(config, out, **options) -> Session:
    return Session(config, out, learner=options.pop("learner", None) or FakeLearner(config), data=Rows(pairs(14), pairs(5, seed=1, name="held")), **options)


def test_a_tracker_gets_every_line(tmp_path, tracker):
    config, out = config_for(tracker, project="mine"), io.StringIO()
    with redirect_stdout(out):
        summary = session(config, tmp_path / "run").run()
    assert out.getvalue() == ""  # stdout is for results
    (init,) = tracker.inits
    assert init["project"] == "mine" and init["name"].startswith("run-") and init["config"] == config.model_dump(mode="json") and init["resume"] == "allow"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [step if step is not None else metrics["step"] for metrics, step in tracker.logged]
    assert steps == [line["step"] for line in lines] == [0, 1, 2, 3, 4, 4]
    assert tracker.logged[1][0]["loss"] == lines[1]["loss"] and tracker.logged[0][0]["eval/loss"] == lines[0]["loss"] and "loss" not in tracker.logged[0][0]
    if tracker.__name__ == "wandb":
        assert tracker.finished == [{"exit_code": 0}] and tracker.summary["steps"] == 4 and "eval" not in tracker.summary
        assert (("*",), {"step_metric": "step"}) in tracker.defined and all(step is None for _, step in tracker.logged)
    else:
        assert tracker.finished == [{}] and all("step" not in metrics for metrics, _ in tracker.logged)
    assert summary["warnings"] == []


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_one_that_fails_is_said_once_and_training_goes_on(tmp_path, tracker, call):
    config, listener, other = config_for(tracker), Listener(), tmp_path / "other"
    session(config, other).run()
    tracker.fail = call
    logged = len(tracker.logged)
    session(config, tmp_path / "run", reporter=listener).run()
    assert listener.warnings == [f"log.{tracker.__name__}: RuntimeError: {call} went wrong. Nothing more is sent there; training goes on, and metrics.jsonl has everything."]
    assert len(tracker.logged) - logged == (6 if call == "finish" else 0)
    for name in ("run", "other"):
        assert (tmp_path / name / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == (other / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_resumed_run_goes_on_in_the_same_place(tmp_path, tracker):
    """The folder has another name by then; another run of the same name is another one there."""
    config = config_for(tracker)
    learner = FakeLearner(config)

    def interrupt(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    learner.before_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        session(config, tmp_path / "run", learner=learner).run()
    assert tracker.finished == ([{"exit_code": 1}] if tracker.__name__ == "wandb" else [{}])
    (tmp_path / "run").rename(tmp_path / "moved")
    session(config, tmp_path / "moved", resume=True).run()
    first, second = tracker.inits
    assert first["name"] == second["name"] and first.get("id") == second.get("id")
    session(configure({"preference": {"loss": "dpo"}}, train={"batch_size": 4, "epochs": 1, "seed": 5}, log={tracker.__name__: {}}), tmp_path / "x" / "run").run()
    assert tracker.inits[2]["name"] != first["name"] and (tracker.__name__ == "trackio" or tracker.inits[2]["id"] != first["id"])
    assert [len(i) for i in (first.get("id") or "x" * 12,)] == [12]


def test_trackers_may_change_when_a_run_is_resumed(tmp_path, tracker):
    config = configure({"preference": {"loss": "dpo"}}, train={"batch_size": 4, "epochs": 1, "save_every": 2})
    learner = FakeLearner(config)

    def interrupt(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    learner.before_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        session(config, tmp_path / "run", learner=learner).run()
    assert tracker.inits == []
    session(config_for(tracker, name="given"), tmp_path / "run", resume=True).run()
    assert [i["name"] for i in tracker.inits] == ["given"]


def test_a_package_that_is_missing_is_refused_before_anything_is_written(tmp_path, tracker, monkeypatch):
    monkeypatch.delitem(sys.modules, tracker.__name__)
    monkeypatch.setattr("upo.training.sinks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf'log.{tracker.__name__}: the package {tracker.__name__} is not installed: pip install "upo\[{tracker.__name__}\]"'):
        session(config_for(tracker), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_only_finite_numbers_are_sent():
    assert numbers({"step": 3, "loss": 0.5, "lr": None, "kl": float("nan"), "n": 2, "eval": True, "x": "y"}) == {"eval/loss": 0.5, "eval/n": 2.0}
