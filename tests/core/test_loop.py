"""A whole run with a fake learner: files, metrics, cadence, refusals before anything is written, and errors on the way."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import yaml
from fake_learner import UPO, A, B, FakeLearner, Rows, ThreadComm, configure, pairs, unpaired

from upo import tensors
from upo.adapters import read_adapter
from upo.config import load_config
from upo.errors import BackendError, ConfigError, DataError, ModelError, NonFiniteError, RunError
from upo.training.checkpoint import seal
from upo.training.metrics import NAMES
from upo.training.prepare import prepare
from upo.training.reporter import Silent
from upo.training.session import Session

KTO = {"preference": {"loss": "kto"}}


class Listener(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.infos: list[str] = []
        self.warnings: list[str] = []
        self.phases: list[tuple[str, int, str]] = []
        self.done: list[int] = []
        self.records: list[dict[str, Any]] = []

    def info(self, text: str) -> None:
        self.infos.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def start(self, phase: str, total: int, unit: str) -> None:
        self.phases.append((phase, total, unit))
        self.done.append(0)

    def advance(self, done: int) -> None:
        self.done[-1] += done

    def metrics(self, record: Any) -> None:
        self.records.append(dict(record))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # hundreds of small files: waiting for the disk is most of the time


def session(config, out, rows=None, learner=None, **options) -> Session:
    return Session(config, out, learner=learner or FakeLearner(config), data=rows or Rows(pairs(14)), **options)


def lines(out) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# --- A run from end to end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [{"preference": {"loss": "dpo"}}, KTO, {"preference": {"loss": "sft"}}, UPO], ids=["dpo", "kto", "sft", "upo"])
def test_a_run_from_end_to_end(tmp_path, objective):
    """14 rows in steps of 4, twice: 8 steps, the fourth and last with 2 rows."""
    out, listener = tmp_path / "run", Listener()
    config = configure(objective, train={"batch_size": 4, "epochs": 2, "eval_every": 3, "save_every": 3, "keep_checkpoints": 2, "micro_batch_tokens": 64})
    learner = FakeLearner(config)
    rows = Rows(pairs(14), pairs(5, seed=1, name="held_out"))
    summary = session(config, out, rows, learner, reporter=listener).run()

    assert sorted(p.name for p in out.iterdir()) == [
        "adapter", "checkpoints", "config.yaml", "inputs.safetensors", "manifest.json", "metrics.jsonl", "summary.json",
    ]  # fmt: skip
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000006", "step-000008"]
    assert load_config(out / "config.yaml") == config
    assert learner.steps == list(range(8))

    records = lines(out)
    assert [(r["step"], r.get("eval", False)) for r in records] == [
        (0, True), (1, False), (2, False), (3, False), (3, True), (4, False), (5, False), (6, False), (6, True), (7, False), (8, False), (8, True),
    ]  # fmt: skip
    training, evaluation = [r for r in records if "eval" not in r], [r for r in records if "eval" in r]
    speed = {"rows_per_s", "tokens_per_s", "peak_memory_gb", "seconds", "slots", "padding", "shared_tokens"}
    assert all(set(r) <= set(NAMES) for r in records)
    assert all({"step", "epoch", "loss", "loss/preference", "accuracy", "margin", "lr", "grad_norm"} | speed <= set(r) for r in training)
    assert all({"step", "eval", "loss", "accuracy"} | speed <= set(r) and "lr" not in r for r in evaluation)
    weights = {"loss/auxiliary", "loss/value", "weight/mean", "weight/p95", "weight/max", "weight/ess", "value/mean", "reward/mean"}
    for r in records:
        assert (weights <= set(r)) if objective is UPO else not (weights & set(r))
        assert ("kl" in r) == (objective != {"preference": {"loss": "sft"}})
        assert ("value_grad_norm" in r) == (objective is UPO and "eval" not in r)
    assert [r["epoch"] for r in training] == pytest.approx([4 / 14, 8 / 14, 12 / 14, 1, 18 / 14, 22 / 14, 26 / 14, 2])
    assert evaluation[-1]["loss"] < 0.995 * evaluation[0]["loss"]
    assert listener.records == records

    adapter = read_adapter(out / "adapter")
    for name, array in learner.adapter.items():
        np.testing.assert_array_equal(adapter.arrays[name], array)
    last = out / "checkpoints" / "step-000008"
    np.testing.assert_array_equal(tensors.read(last / "adapter_model.safetensors")[B], learner.adapter[B])
    assert (last / "value_head.safetensors").is_file() == (objective is UPO)

    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["rows"] == 28 and summary["steps"] == 8 and summary["peak_memory_gb"] == 0.25 and summary["warnings"] == []
    assert summary["eval"] == {"before": evaluation[0], "after": evaluation[-1]}
    assert summary["total_s"] >= summary["train_s"] + summary["reference_s"] > 0
    assert summary["rows_per_s"] == pytest.approx(28 / (summary["train_s"] + summary["reference_s"]))
    assert ("value/fit_loss" in summary["value_fit"]) == (objective is UPO)

    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["data"]["train"] == {"source": "train.jsonl", "rows": 14, "completions": 28}
    assert manifest["identity"]["model"] == "w0" and manifest["steps"] == 8
    (stretch,) = manifest["sessions"]
    assert (stretch["from_step"], stretch["to_step"], stretch["ranks"], stretch["backend"]) == (0, 8, 1, "torch")
    assert {"upo", "python", "numpy", "torch"} <= set(stretch["versions"])
    for (phase, total, _), done in zip(listener.phases, listener.done, strict=True):
        assert done == total, phase
    assert listener.phases[-1] == ("train", 8, "steps")


def test_without_evaluation_rows(tmp_path):
    summary = session(configure(train={"eval_every": 2}), tmp_path / "run").run()
    assert summary["eval"] == {"before": None, "after": None}
    assert not [r for r in lines(tmp_path / "run") if "eval" in r]


def test_by_default_the_evaluation_is_before_and_after(tmp_path):
    session(configure(), tmp_path / "run", Rows(pairs(14), pairs(5, seed=1))).run()
    assert [r["step"] for r in lines(tmp_path / "run") if "eval" in r] == [0, 8]


def test_every_row_once_per_epoch_and_the_schedule_is_used(tmp_path):
    config = configure(optimizer={"lr": 0.4, "schedule": "linear", "warmup_steps": 2}, train={"batch_size": 4, "epochs": 2})
    learner = FakeLearner(config)
    seen: list[str] = []
    step = learner.step
    learner.step = lambda batch, lr: (seen.extend(batch.origins), step(batch, lr))[1]  # type: ignore[method-assign]
    session(config, tmp_path / "run", learner=learner).run()
    assert sorted(seen[:14]) == sorted(seen[14:]) == sorted(e.origin for e in pairs(14))
    assert seen[:14] != seen[14:]
    assert learner.lrs == pytest.approx([0.2, 0.4, 0.4, 0.4 * 5 / 6, 0.4 * 4 / 6, 0.2, 0.4 * 2 / 6, 0.4 / 6])
    assert [r["lr"] for r in lines(tmp_path / "run")] == learner.lrs


def test_the_logged_loss_is_the_objective_before_the_update(tmp_path):
    """Step 1 of DPO from its reference is log 2, whatever the rows."""
    session(configure(), tmp_path / "run").run()
    first, *_, last = lines(tmp_path / "run")
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6) and first["accuracy"] == 0.5 and first["kl"] == 0
    assert last["loss"] < first["loss"]


def test_the_value_head_is_fitted_first(tmp_path):
    """V starts at the mean reward, so the weights start around exp(0.3 lambda) and exp(-0.3 lambda)."""
    config = configure(UPO, train={"micro_batch_tokens": 30})
    run = session(config, tmp_path / "run")
    assert run.value_fit == {"value/fit_loss": pytest.approx(0.09, rel=1e-5)}
    run.run()
    first = lines(tmp_path / "run")[0]
    assert first["value/mean"] == pytest.approx(0.5, abs=1e-6)
    assert first["weight/mean"] == pytest.approx((math.exp(1.5) + math.exp(-1.5)) / 2, rel=1e-5)


# --- What is refused, with nothing written ----------------------------------------------------------------------------------------


def refused(error, match, config, tmp_path, rows=None, **options):
    """The session is refused before the learner is touched and before the folder is made."""
    learner = FakeLearner(config)
    with pytest.raises(error, match=match):
        Session(config, tmp_path / "run", learner=learner, data=rows or Rows(pairs(14)), **options)
    assert learner.scored == 0 and not (tmp_path / "run").exists()


def test_losses_that_do_not_fit_the_rows(tmp_path):
    single = Rows(unpaired(8))
    refused(ConfigError, r"^objective\.preference: dpo compares pairs.*train\.jsonl:1, .*and 3 more; data\.train holds 8 unpaired rows\. "
            r"Losses that work on these rows: .*kto, .*sft\.", configure(), tmp_path, single)  # fmt: skip
    bare = Rows(unpaired(8, labels=(0,)))
    refused(ConfigError, r"kto needs a label .*data\.train holds 8 scored groups\. Losses that work on these rows: qrpo, exo_reward", configure(KTO), tmp_path, bare)
    refused(ConfigError, r"sft learns from chosen .* there are none", configure({"preference": {"loss": "sft"}}), tmp_path, Rows(unpaired(8, labels=(-1,))))
    refused(ConfigError, r"data\.eval holds 4 unpaired rows", configure(), tmp_path, Rows(pairs(8), unpaired(4)))
    mixed = [{"loss": "kto"}, {"loss": "dpo", "weight": 0.5}]
    refused(ConfigError, "dpo compares pairs", configure({"preference": mixed}), tmp_path, single)


def test_an_actor_that_never_switches_on(tmp_path):
    late = {"preset": "upo", "auxiliary": {**UPO["auxiliary"], "actor_warmup_steps": 8}}
    refused(ConfigError, r"actor_warmup_steps: the actor stays off for 8 steps and the run has 8", configure(late), tmp_path)
    listener = Listener()
    soon = {"preset": "upo", "auxiliary": {**UPO["auxiliary"], "actor_warmup_steps": 7}}
    session(configure(soon), tmp_path / "run", reporter=listener).run()
    assert any("The actor is off for 7 of 8 steps" in w for w in listener.warnings)
    auxiliary = [r["loss/auxiliary"] for r in lines(tmp_path / "run")]
    assert auxiliary[:7] == [0.0] * 7 and auxiliary[7] != 0


def test_a_run_shorter_than_its_warm_up(tmp_path):
    listener = Listener()
    session(configure(optimizer={"warmup_steps": 8}), tmp_path / "run", reporter=listener)
    assert any("warms up over 8" in w and "optimizer.warmup_steps" in w for w in listener.warnings)


def test_other_refusals(tmp_path):
    code = {"preset": "upo", "auxiliary": {"rewards": [{"scorer": "python", "function": "os:getcwd"}]}}
    refused(ConfigError, "--allow-code", configure(code), tmp_path)
    missing = {"preset": "upo", "auxiliary": {"rewards": [{"scorer": "column", "column": "goall"}]}}
    refused(DataError, r"train\.jsonl:1", configure(missing), tmp_path)
    same = Rows([replace(e, prompt=np.array([5, 6], np.int32)) for e in pairs(8)])
    refused(DataError, "no prompt may own more than half", configure(KTO), tmp_path, same)
    refused(RunError, "holds no run", configure(), tmp_path, resume=True)


def test_a_folder_that_holds_a_run_is_left_alone(tmp_path):
    config = configure()
    session(config, tmp_path / "run").run()
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    for options, match in (({}, "holds a run already"), ({"resume": True}, "is finished")):
        with pytest.raises(RunError, match=match):
            session(config, tmp_path / "run", **options)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_missing_backend_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("upo.backend.installed", lambda name: False)
    with pytest.raises(BackendError, match=r'pip install "upo\[torch\]"'):
        Session(configure(), tmp_path / "run", data=Rows(pairs(8)))
    assert not (tmp_path / "run").exists()


# --- Errors on the way ------------------------------------------------------------------------------------------------------------


def test_reference_and_policy_that_differ_at_the_start(tmp_path):
    learner = FakeLearner(configure())
    learner.reference_offset = 0.02
    with pytest.raises(ModelError, match=r"step 1: policy and reference differ by 0\.02 nats"):
        session(configure(), tmp_path / "run", learner=learner).run()
    for dtype, offset, warned in (("float32", 0.005, 0), ("bfloat16", 0.9, 0), ("bfloat16", 1.5, 1)):
        learner, listener = FakeLearner(configure(), weights=f"{dtype}{offset}"), Listener()
        learner.reference_offset, learner.info = offset, replace(learner.info, dtype=dtype)
        session(configure(), tmp_path / f"{dtype}{offset}", learner=learner, reporter=listener).run()
        assert len(listener.warnings) == warned


def test_a_policy_that_starts_elsewhere_is_not_compared(tmp_path):
    """From an adapter with the base as reference the two differ rightly; with `start` as reference they may not."""
    config = configure()
    session(config, tmp_path / "first").run()
    start = str(tmp_path / "first" / "adapter")
    for reference, fine in (("base", True), ("start", False), (start, False)):
        config = configure(adapter={"start": start}, reference=reference)
        learner = FakeLearner(config, weights=f"w{reference}")
        learner.reference_offset = 5.0
        run = session(config, tmp_path / f"second-{fine}-{len(reference)}", learner=learner)
        if fine:
            run.run()
        else:
            with pytest.raises(ModelError, match="policy and reference differ"):
                run.run()


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(tmp_path):
    config = configure(train={"save_every": 3, "keep_checkpoints": 1})
    learner = FakeLearner(config)
    good: dict[str, np.ndarray] = {}

    def poison(step: int) -> None:
        if step == 5:
            good.update(learner.adapter)
            learner.table[:] = np.nan

    learner.before_step = poison
    with pytest.raises(NonFiniteError, match=r"^step 6: .*train\.jsonl:\d+.*state after step 5 is saved in .*step-000005.*adapter\.start") as error:
        session(config, tmp_path / "run", learner=learner).run()
    assert error.value.__suppress_context__
    out = tmp_path / "run"
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000003", "step-000005"]  # beside the regular one, not instead of it
    kept = read_adapter(out / "checkpoints" / "step-000005").arrays
    np.testing.assert_array_equal(kept[A], good[A])
    np.testing.assert_array_equal(kept[B], good[B])
    assert [r["step"] for r in lines(out)] == [1, 2, 3, 4, 5]
    assert not (out / "summary.json").exists() and not (out / "adapter").exists()


def test_heavy_weights_are_warned_about_once(tmp_path):
    rows, listener = Rows([replace(e, columns={"goal": (0.0, 2.0)}) for e in pairs(14)]), Listener()  # V is 1, so the weights reach exp(5)
    config = configure(UPO, optimizer={"lr": 1e-4})
    session(config, tmp_path / "run", rows, reporter=listener).run()
    assert [r["weight/mean"] > 10 for r in lines(tmp_path / "run")].count(True) > 1
    (warning,) = [w for w in listener.warnings if "weights average" in w]
    assert "objective.auxiliary.temperature" in warning
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["warnings"] == listener.warnings


def test_ctrl_c_finishes_the_step_and_saves(tmp_path):
    config, listener = configure(), Listener()
    learner = FakeLearner(config)
    learner.before_step = lambda step: signal.raise_signal(signal.SIGINT) if step == 2 else None
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        session(config, tmp_path / "run", learner=learner, reporter=listener).run()
    assert signal.getsignal(signal.SIGINT) is handler
    out = tmp_path / "run"
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000003"]
    assert learner.steps == [0, 1, 2] and [r["step"] for r in lines(out)] == [1, 2, 3]
    assert "Ctrl-C again" in listener.warnings[0]
    assert listener.warnings[1] == f"Stopped after step 3 of 8; the state after step 3 is saved. Go on with: upo train --resume --out {out}"
    assert json.loads((out / "manifest.json").read_text())["sessions"][0]["to_step"] == 3


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    config, listener = configure(train={"save_every": 2}), Listener()
    learner = FakeLearner(config)

    def twice(step: int) -> None:
        """A signal may reach the process by another thread, a moment later, and two that wait are one."""
        if step == 3:
            signal.raise_signal(signal.SIGINT)
            until = time.monotonic() + 10
            while time.monotonic() < until and not any("Ctrl-C again" in text for text in listener.warnings):
                time.sleep(0.001)
            signal.raise_signal(signal.SIGINT)
            time.sleep(10)

    learner.before_step = twice
    with pytest.raises(KeyboardInterrupt):
        session(config, tmp_path / "run", learner=learner, reporter=listener).run()
    assert learner.steps == [0, 1, 2]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    assert re.search(r"Stopped after step 3 of 8; the state after step 2 is saved", listener.warnings[-1])


# --- Several ranks ----------------------------------------------------------------------------------------------------------------


def test_ranks_agree_and_rank_0_writes(tmp_path):
    """Three ranks as threads end where one rank alone ends, with one folder and one voice."""
    config = configure(UPO, train={"micro_batch_tokens": 64, "eval_every": 3})
    rows = Rows(pairs(14), pairs(5, seed=1, name="held_out"))
    alone = FakeLearner(config, weights="alone")
    session(config, tmp_path / "alone", rows, alone).run()
    learners = [FakeLearner(config, comm) for comm in ThreadComm.make(3)]
    listeners = [Listener() for _ in learners]
    for learner in learners:
        learner.table = alone.table * 0 + FakeLearner(config, weights="alone").table

    def run(rank: int) -> dict[str, Any]:
        return session(config, tmp_path / "run", rows, learners[rank], reporter=listeners[rank]).run()

    with ThreadPoolExecutor(3) as pool:
        summaries = list(pool.map(run, range(3)))
    for learner in learners:
        for part, arrays in alone.state().items():
            for name, array in arrays.items():
                np.testing.assert_array_equal(learner.state()[part][name], array)
    three, one = ([{k: v for k, v in r.items() if k not in ("slots", "padding")} for r in timeless(lines(tmp_path / name))] for name in ("run", "alone"))
    assert three == one
    assert [{k: v for k, v in timeless([s["eval"]["after"]])[0].items() if k in one[-1]} for s in summaries] == one[-1:] * 3
    figures = [{k: s[k] for k in ("slots", "padding", "shared_tokens")} for s in summaries]
    assert figures == figures[:1] * 3 and figures[0]["slots"] == sum(r["slots"] for r in lines(tmp_path / "run") if "eval" not in r)
    assert len(listeners[0].records) == len(lines(tmp_path / "run"))
    assert not listeners[1].records and not listeners[2].records
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["sessions"][0]["ranks"] == 3


def test_ranks_stop_after_the_same_step(tmp_path):
    """Ctrl-C reaches ranks at different moments; if one is asked to stop, all leave together."""
    config = configure()
    learners = [FakeLearner(config, comm) for comm in ThreadComm.make(2)]

    class Asked:
        def __init__(self, reporter: Any) -> None:
            self.steps = 0

        def __enter__(self) -> Asked:
            return self

        def __exit__(self, *_: Any) -> None: ...

    from upo.training import loop
    from upo.training.interrupt import Interrupt

    def agreed(self: Any, comm: Any) -> bool:
        self.steps += 1
        self.requested = comm.rank == 1 and self.steps == 3
        return Interrupt.agreed(self, comm)

    Asked.agreed = agreed  # type: ignore[attr-defined]
    original, loop.Interrupt = loop.Interrupt, Asked  # type: ignore[misc, assignment]
    try:
        with ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(lambda i: session(config, tmp_path / "run", learner=learners[i]).run(), i) for i in range(2)]
            assert all(isinstance(run.exception(30), KeyboardInterrupt) for run in runs)
    finally:
        loop.Interrupt = original  # type: ignore[misc]
    assert [learner.steps for learner in learners] == [[0, 1, 2], [0, 1, 2]]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]


def test_no_rank_writes_before_all_have_looked(tmp_path):
    """A slow rank still finds no run in the folder. SFT needs no reference, so nothing else makes the fast one wait."""
    config = configure({"preference": {"loss": "sft"}})
    learners = [FakeLearner(config, comm) for comm in ThreadComm.make(2)]

    def run(rank: int) -> int:
        time.sleep(0.2 * rank)
        return session(config, tmp_path / "run", learner=learners[rank]).run()["steps"]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == [8, 8]


# --- On with a run ----------------------------------------------------------------------------------------------------------------

TIMES = ("rows_per_s", "tokens_per_s", "seconds", "peak_memory_gb", "mfu")


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def same_files(one, other) -> None:
    """Bit for bit, time and memory aside."""
    assert timeless(lines(one)) == timeless(lines(other))
    files = sorted(p.relative_to(one) for p in one.rglob("*.safetensors"))
    assert files == sorted(p.relative_to(other) for p in other.rglob("*.safetensors")) and len(files) >= 5
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


class Killed(BaseException):
    """The process ends."""


@pytest.mark.parametrize("stop", [0, 1, 3, 5, 6, 7])
@pytest.mark.parametrize("how", ["ctrl-c", "killed"])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, stop, how):
    """UPO with a value head and momentum, evaluations every 3 steps, checkpoints every 2; stopped in step `stop` + 1."""
    config = configure(UPO, optimizer={"schedule": "cosine", "warmup_steps": 2}, train={"eval_every": 3, "save_every": 2, "keep_checkpoints": 2})
    rows = Rows(pairs(14), pairs(5, seed=1, name="held_out"))
    whole = session(config, tmp_path / "whole", rows).run()

    out, learner = tmp_path / "stopped", FakeLearner(config)

    def at(step: int) -> None:
        if step == stop:
            if how == "killed":
                raise Killed
            signal.raise_signal(signal.SIGINT)

    learner.before_step = at
    if (how, stop) == ("ctrl-c", 7):
        session(config, out, rows, learner).run()  # the last step: there is nothing left to stop
        assert (out / "summary.json").is_file()
    else:
        with pytest.raises((KeyboardInterrupt, Killed)):
            session(config, out, rows, learner).run()
        with (out / "metrics.jsonl").open("a") as file:
            file.write('{"step": 99, ' if how == "killed" else "")
        resumed = FakeLearner(config)
        summary = session(config, out, rows, resumed, resume=True).run()
        done = stop - stop % 2 if how == "killed" else stop + 1
        assert resumed.steps == list(range(done, 8))
        assert summary["eval"]["before"]["step"] == 0 and summary["eval"]["after"]["step"] == 8
        assert {k: summary[k] for k in ("slots", "padding", "shared_tokens")} == {k: whole[k] for k in ("slots", "padding", "shared_tokens")}
        manifest = json.loads((out / "manifest.json").read_text())
        assert [(s["from_step"], s["to_step"]) for s in manifest["sessions"]] == [(0, done), (done, 8)]
    for extra in {p.name for p in (out / "checkpoints").iterdir()} - {p.name for p in (tmp_path / "whole" / "checkpoints").iterdir()}:
        assert extra == f"step-{stop + 1:06d}"  # Ctrl-C's own checkpoint may still be among the newest
    if how == "killed":
        same_files(tmp_path / "whole", out)
    else:
        assert timeless(lines(out)) == timeless(lines(tmp_path / "whole"))
        for file in ("adapter/adapter_model.safetensors", "checkpoints/step-000008/optimizer.safetensors", "checkpoints/step-000008/value_head.safetensors"):
            assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def stopped(config, out, rows=None, step=3, **options) -> None:
    learner = FakeLearner(config, **options)
    learner.before_step = lambda s: signal.raise_signal(signal.SIGINT) if s == step else None
    with pytest.raises(KeyboardInterrupt):
        session(config, out, rows, learner).run()


def test_times_add_up_over_sessions(tmp_path):
    config = configure()
    stopped(config, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-000004" / "state.json"
    content = json.loads(path.read_text())
    content["seconds"] = {"reference": 100.0, "train": 1000.0, "total": 5000.0}
    path.write_text(json.dumps(seal(content)))
    summary = session(config, tmp_path / "run", resume=True).run()
    assert summary["rows"] == 28
    assert 100 < summary["reference_s"] < 101 and 1000 < summary["train_s"] < 1010 and 5000 < summary["total_s"] < 5010


@pytest.mark.parametrize(
    "change, shown",
    [
        ({"objective": {"preference": {"loss": "dpo", "beta": 0.2}}}, r"objective\.preference\.0\.beta: None in the run, 0\.2 now"),
        ({"optimizer": {"lr": 0.1}}, r"optimizer\.lr: 0\.5 in the run, 0\.1 now"),
        ({"optimizer": {"schedule": "linear"}}, r"optimizer\.schedule: 'constant' in the run, 'linear' now"),
        ({"train": {"batch_size": 2}}, r"train\.batch_size: 4 in the run, 2 now"),
        ({"train": {"seed": 1}}, r"train\.seed: 0 in the run, 1 now"),
        ({"adapter": {"rank": 4}}, r"adapter\.rank: 16 in the run, 4 now"),
    ],
)
def test_what_may_not_change(tmp_path, change, shown):
    config = configure()
    stopped(config, tmp_path / "run")
    before = lines(tmp_path / "run")
    with pytest.raises(RunError, match=shown):
        session(configure(**change), tmp_path / "run", resume=True)
    assert lines(tmp_path / "run") == before


def test_what_may_change(tmp_path):
    """Backend, device, dtype, micro-batches, cadence; also the names of places whose contents are the same."""
    stopped(configure(), tmp_path / "run")
    other = configure(
        backend="mlx", device="cpu", dtype="float32", model="moved", data={"train": "elsewhere.jsonl"},
        train={"micro_batch_tokens": 99, "eval_every": 2, "save_every": 5, "keep_checkpoints": 1, "gradient_checkpointing": True},
    )  # fmt: skip
    listener = Listener()
    rows = Rows([replace(e, origin=e.origin.replace("train", "elsewhere")) for e in pairs(14)])
    session(other, tmp_path / "run", rows, resume=True, reporter=listener).run()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert [(s["backend"], s["from_step"], s["to_step"]) for s in manifest["sessions"]] == [("torch", 0, 4), ("mlx", 4, 8)]
    assert any("computed anew" in text and "largest difference to the earlier ones 0 nats" in text for text in listener.infos)
    assert any("Going on after step 4 of 8" in text for text in listener.infos)
    assert listener.phases[-1] == ("train", 4, "steps")


def test_changed_contents_are_refused(tmp_path):
    config = configure(UPO)
    stopped(config, tmp_path / "run", Rows(pairs(14)))

    def refuse(name, rows=None, learner=None):
        with pytest.raises(RunError, match=rf"the contents of {re.escape(name)} are not those"):
            session(config, tmp_path / "run", rows, learner, resume=True)

    shorter = pairs(14)
    shorter[3] = replace(shorter[3], prompt=np.append(shorter[3].prompt, 5).astype(np.int32))
    refuse("data.train", Rows(shorter))
    refuse("data.eval", Rows(pairs(14), pairs(2, seed=1)))
    refuse("rewards", Rows([replace(e, columns={"goal": (0.2, 0.9)}) for e in pairs(14)]))
    refuse("model", learner=FakeLearner(config, weights="other"))
    session(config, tmp_path / "run", resume=True).run()


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    """The run goes on from the one before, and ends as if nothing had happened."""
    config = configure(train={"save_every": 2, "keep_checkpoints": 3})
    session(config, tmp_path / "whole").run()
    stopped(config, tmp_path / "run", step=3)
    path = tmp_path / "run" / "checkpoints" / "step-000004" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    learner, listener = FakeLearner(config), Listener()
    session(config, tmp_path / "run", learner=learner, resume=True, reporter=listener).run()
    assert learner.steps == [2, 3, 4, 5, 6, 7]
    assert any("step-000004: optimizer.safetensors is damaged" in w for w in listener.warnings)
    same_files(tmp_path / "whole", tmp_path / "run")


def test_a_run_that_ended_before_its_result_was_written(tmp_path):
    config = configure()
    session(config, tmp_path / "run").run()
    whole = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "run" / "summary.json").unlink()
    learner = FakeLearner(config)
    assert session(config, tmp_path / "run", learner=learner, resume=True).run()["steps"] == 8
    assert learner.steps == [] and (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == whole


def test_the_configuration_on_disk_is_readable(tmp_path):
    session(configure(UPO), tmp_path / "run").run()
    text = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert text["objective"]["auxiliary"]["gamma"] == 0.3 and text["train"]["batch_size"] == 4


def test_anchors_are_kept_only_for_a_loss_that_uses_them():
    """Whatever a row brings in vain would be scored by the reference and, with a gradient, by the policy."""
    rows = [replace(row, anchor=np.array([3, 4], np.int32)) for row in pairs(4)]
    for loss, kept in (("dpo", 0), ("bapo", 4)):
        prepared = prepare(configure({"preference": {"loss": loss}}), allow_code=False, reporter=Silent(), data=Rows(rows, rows))
        assert sum(e.anchor is not None for e in prepared.train) == sum(e.anchor is not None for e in prepared.eval) == kept


def test_the_layout_is_settled_before_the_reference(tmp_path):
    """The learner is given the longest prompt; what it falls back to is said, and is the layout in which the reference is scored."""

    class Falls(FakeLearner):
        def check_sharing(self, row):
            super().check_sharing(row)
            assert self.scored == 0
            self.info = replace(self.info, layout="padded", notes=(*self.info.notes, "train.prefix_sharing: it fell back"))

    config, listener, rows = configure(), Listener(), Rows(pairs(14))
    padded, learner = FakeLearner(config), Falls(config)
    learner.info = replace(learner.info, layout="packed")
    fallen = session(config, tmp_path / "fallen", rows, learner, reporter=listener)
    assert "train.prefix_sharing: it fell back" in listener.infos
    assert len(learner.tried.prompts[0]) == max(len(e.prompt) for e in rows.train)
    assert fallen._references == session(config, tmp_path / "padded", rows, padded)._references
