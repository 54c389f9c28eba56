"""On with a run: what must be the same and how a difference is shown, what may change, and what the run folder says afterwards."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_learner import UPO, A, FakeLearner, Rows, configure, pairs

from upo.config import RunConfig, load_config
from upo.errors import ConfigError, RunError
from upo.training.checkpoint import read_checkpoint, seal
from upo.training.reporter import Silent
from upo.training.run import Run
from upo.training.schedule import lr_at
from upo.training.session import Session

TIMES = ("rows_per_s", "tokens_per_s", "seconds", "peak_memory_gb", "mfu")
KTO = {"preference": {"loss": "kto"}}


class Listener(Silent):
    def __init__(self) -> None:
        self.infos: list[str] = []
        self.warnings: list[str] = []

    def info(self, text: str) -> None:
        self.infos.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(autouse=True)
def fast(tmp_path, monkeypatch):
    monkeypatch.setenv("UPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def session(config: RunConfig, out: Path, rows: Rows | None = None, learner: FakeLearner | None = None, **options: Any) -> Session:
    return Session(config, out, learner=learner or FakeLearner(config), data=rows or Rows(pairs(14), pairs(4, seed=1, name="held_out")), **options)


def stopped(config: RunConfig, out: Path, rows: Rows | None = None, step: int = 4, number: int = signal.SIGINT, **options: Any) -> Listener:
    """The run up to a step, as Ctrl-C leaves it."""
    learner, listener = FakeLearner(config), Listener()
    learner.before_step = lambda s: os.kill(os.getpid(), number) if s == step - 1 else None
    with pytest.raises(KeyboardInterrupt):
        session(config, out, rows, learner, reporter=listener, **options).run()
    return listener


def lines(out: Path, evaluation: bool | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = [{name: value for name, value in line.items() if name not in TIMES} for line in found]
    return [line for line in found if evaluation is None or line.get("eval", False) == evaluation]


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())


def checkpoints(out: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in (out / "checkpoints").iterdir())


def result(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


# --- The difference is shown ------------------------------------------------------------------------------------------------------


def refused(match: str, config: RunConfig, out: Path, rows: Rows | None = None, learner: FakeLearner | None = None, **options: Any) -> None:
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(RunError, match=match) as caught:
        session(config, out, rows, learner, resume=True, **options)
    assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_rows_that_differ(tmp_path):
    config, out = configure(UPO), tmp_path / "run"
    stopped(config, out)
    held_out = pairs(4, seed=1, name="held_out")
    rows = pairs(14)
    longer = replace(rows[3], prompt=np.append(rows[3].prompt, 5).astype(np.int32))
    refused(r"\(data\.train: 1 of 14 rows, from train\.jsonl:4 on\)\. Restore them, or", config, out, Rows([*rows[:3], longer, *rows[4:]], held_out))
    refused(r"\(data\.train: 14 rows in the run, 13 now, from train\.jsonl:7 on\)", config, out, Rows([*rows[:5], *rows[6:]], held_out))
    refused(r"\(data\.train: 14 rows in the run, 15 now, from train\.jsonl:15 on\)", config, out, Rows([*rows, pairs(15)[14]], held_out))
    refused(r"\(data\.train: 14 rows in the run, 10 now\)", config, out, Rows(rows[:10], held_out))
    refused(r"\(data\.train: the same 14 rows in another order, from train\.jsonl:2 on\)", config, out, Rows([rows[1], rows[0], *rows[2:]], held_out))
    refused(r"\(data\.eval: 4 rows in the run, 0 now\)", config, out, Rows(rows))
    turned = replace(rows[0], labels=(-1, 1))
    refused(r"\(data\.train: 1 of 14 rows, from train\.jsonl:1 on\)", config, out, Rows([turned, *rows[1:]], held_out))
    session(config, out, resume=True).run()


def test_rewards_that_differ(tmp_path):
    """By more than rounding: the last bits of a scorer are another platform's business."""
    config, out = configure(UPO), tmp_path / "run"
    stopped(config, out)
    rows, held_out = pairs(14), pairs(4, seed=1, name="held_out")
    other = [*rows[:6], replace(rows[6], columns={"goal": (0.2, 0.9)}), *rows[7:]]
    refused(r"contents of rewards are not.*\(rewards: 1 of 28 differ, by up to 0\.1, from train\.jsonl:7 on\)", config, out, Rows(other, held_out))
    near = [replace(e, columns={"goal": (0.2 + 1e-9, 0.8 - 4e-7)}) for e in rows]  # rounded to six decimals they would not be the same
    session(config, out, Rows(near, held_out), resume=True).run()


def test_where_the_inputs_are_lost_hashes_are_shown(tmp_path):
    config, out = configure(UPO), tmp_path / "run"
    stopped(config, out)
    (out / "inputs.safetensors").unlink()
    refused(r"\(data\.train: [0-9a-f]{12} in the run, [0-9a-f]{12} now\)", config, out, Rows(pairs(13), pairs(4, seed=1)))
    refused(r"\(rewards: [0-9a-f]{12} in the run, [0-9a-f]{12} now\)", config, out, Rows([replace(e, columns={"goal": (0.2, 0.9)}) for e in pairs(14)], pairs(4, seed=1)))
    session(config, out, resume=True).run()


def test_model_order_and_start_adapter(tmp_path, monkeypatch):
    config, out = configure(KTO), tmp_path / "run"
    stopped(config, out)
    refused(r"contents of model are not.*\(model: w0 in the run, other now\)", config, out, learner=FakeLearner(config, weights="other"))
    monkeypatch.setattr("upo.training.identity.epoch_order", lambda n, seed, epoch: np.arange(n))  # a version that orders rows otherwise
    refused(r"contents of order are not", config, out)
    monkeypatch.undo()
    monkeypatch.setenv("UPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("upo.training.prepare.assign_partners", lambda rows, seed, longest: [replace(e, partners=e.completions) for e in rows])
    refused(r"contents of order are not", config, out)


def test_a_start_adapter_that_was_replaced(tmp_path):
    """Its arrays come from the checkpoint, but its scale does not."""
    session(configure(), tmp_path / "first").run()
    start = tmp_path / "first" / "adapter"
    config, out = configure(adapter={"start": str(start)}), tmp_path / "run"
    stopped(config, out)
    settings = json.loads((start / "adapter_config.json").read_text())
    (start / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 4 * settings["lora_alpha"]}))
    refused(r"contents of adapter\.start are not", config, out)
    refused(r"contents of adapter\.start are not.*adapter\.start: [0-9a-f]{12} in the run, None now", configure(), out)


def test_a_checkpoint_of_another_run(tmp_path):
    config, out = configure(), tmp_path / "run"
    stopped(config, out)
    stopped(config, tmp_path / "other", Rows(pairs(14, seed=2), pairs(4, seed=1, name="held_out")))
    folder = out / "checkpoints" / "step-000004"
    for path in (tmp_path / "other" / "checkpoints" / "step-000004").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    refused(r"the contents of data\.train are not those that .*step-000004 was started with", config, out)
    content = json.loads((folder / "state.json").read_text())
    for order in ({**content["order"], "batch_size": 2}, {}):
        (folder / "state.json").write_text(json.dumps(seal({**content, "order": order})))
        refused(r"step-000004: written at another place in the order of the rows", config, out)
    del content["identity"]
    (folder / "state.json").write_text(json.dumps(seal(content)))
    refused(r"the contents of data\.eval, data\.train, .*None in the run", config, out)


def test_without_an_intact_checkpoint_nothing_starts_over(tmp_path):
    """It would do all steps again without a word, and write over what may still be mended."""
    config, out = configure(train={"save_every": 2, "keep_checkpoints": 2}), tmp_path / "run"
    stopped(config, out)
    for step in (2, 4):
        path = out / "checkpoints" / f"step-{step:06d}" / "optimizer.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    refused(r"no checkpoint is complete\. .*step-000004: optimizer\.safetensors is damaged .*step-000002: optimizer\.safetensors is damaged", config, out)
    for step in (2, 4):
        (out / "checkpoints" / f"step-{step:06d}").rename(tmp_path / str(step))
    refused(r"checkpoints is empty, and the run had written step-000004\. Copy it", config, out)
    (tmp_path / "2").rename(out / "checkpoints" / "step-000002")
    refused(r"no checkpoint is complete", config, out)


def test_a_checkpoint_that_was_left_behind_is_missed(tmp_path):
    config, out = configure(train={"save_every": 2, "keep_checkpoints": 2}), tmp_path / "run"
    session(config, tmp_path / "whole").run()
    stopped(config, out, step=5)
    assert checkpoints(out) == [4, 5] and manifest(out)["latest"] == "step-000005"
    (out / "checkpoints" / "step-000005").rename(tmp_path / "elsewhere")
    listener, learner = Listener(), FakeLearner(config)
    session(config, out, learner=learner, resume=True, reporter=listener).run()
    assert learner.steps == [4, 5, 6, 7] and result(out) == result(tmp_path / "whole")
    assert "The newest checkpoint of this run, step-000005, is not here. Going on from step-000004." in listener.warnings


# --- More steps -------------------------------------------------------------------------------------------------------------------


def test_more_epochs_under_a_constant_schedule(tmp_path):
    """Stopped or finished, the longer run is the one that was longer from the start; its length is the run's own from there on."""
    short, long = configure(train={"epochs": 2}), configure(train={"epochs": 3})
    session(long, tmp_path / "long").run()
    for name, begin in (("stopped", lambda out: stopped(short, out)), ("finished", lambda out: session(short, out).run())):
        out = tmp_path / name
        begin(out)
        listener = Listener()
        summary = session(long, out, resume=True, reporter=listener).run()
        assert summary["steps"] == 12 and summary["rows"] == 42 and result(out) == result(tmp_path / "long")
        assert lines(out, evaluation=False) == lines(tmp_path / "long", evaluation=False)
        assert lines(out, evaluation=True)[-1] == lines(tmp_path / "long", evaluation=True)[-1]
        assert load_config(out / "config.yaml") == long
        assert manifest(out)["steps"] == 12 and manifest(out)["sessions"][-1]["changed"] == {"train.epochs": [2.0, 3.0]}
        assert f"train.epochs: 2.0 until step {4 if name == 'stopped' else 8}, 3.0 from there on." in listener.infos
        refused("is finished", long, out)


def test_a_longer_run_that_is_stopped_again_is_still_longer(tmp_path):
    """Its earlier result says nothing about it any more."""
    short, long, out = configure(train={"epochs": 2}), configure(train={"epochs": 3}), tmp_path / "run"
    summary = session(short, out).run()
    earlier = result(out)
    stopped(long, out, step=10, resume=True)
    assert json.loads((out / "summary.json").read_text()) == summary and result(out) == earlier
    assert session(load_config(out / "config.yaml"), out, resume=True).run()["steps"] == 12
    assert result(out) != earlier


def test_fewer_steps(tmp_path):
    config, out = configure(train={"epochs": 2}), tmp_path / "run"
    stopped(config, out, step=5)
    refused(r"5 steps are done, more than the 4 of the new train\.epochs or train\.steps", configure(train={"epochs": 1}), out)
    learner = FakeLearner(config)
    assert session(configure(train={"epochs": 2, "steps": 5}), out, learner=learner, resume=True).run()["steps"] == 5
    assert learner.steps == []


def test_another_schedule_needs_saying(tmp_path):
    rates = {"lr": 0.4, "schedule": "cosine", "warmup_steps": 2}
    config, out = configure(optimizer=rates), tmp_path / "run"
    stopped(config, out)
    longer = configure(optimizer=rates, train={"epochs": 3})
    refused(r"train\.epochs: 2\.0 in the run, 3\.0 now.*More or fewer steps need a constant schedule, or --reschedule", longer, out)
    slower = configure(optimizer={**rates, "lr": 0.1}, train={"epochs": 3})
    refused(r"optimizer\.lr: 0\.4 in the run, 0\.1 now; train\.epochs", slower, out)
    refused(r"train\.seed: 0 in the run, 1 now", configure(optimizer=rates, train={"epochs": 3, "seed": 1}), out, reschedule=True)
    learner, listener = FakeLearner(config), Listener()
    session(slower, out, learner=learner, resume=True, reschedule=True, reporter=listener).run()
    assert learner.lrs == [lr_at(slower.optimizer, step, 12) for step in range(4, 12)]
    assert [line["lr"] for line in lines(out, evaluation=False)] == [lr_at(config.optimizer, step, 8) for step in range(4)] + learner.lrs
    was, now = lr_at(config.optimizer, 4, 8), lr_at(slower.optimizer, 4, 12)
    assert f"The run has 12 steps instead of 8; the learning rate of step 5 is {now:.3g}, and would have been {was:.3g}." in listener.infos
    assert load_config(out / "config.yaml") == slower
    assert manifest(out)["sessions"][-1]["changed"] == {"optimizer.lr": [0.4, 0.1], "train.epochs": [2.0, 3.0]}
    schedule = read_checkpoint(out / "checkpoints" / "step-000012").origin["schedule"]
    assert schedule == {"name": "cosine", "lr": 0.1, "warmup_steps": 2, "steps": 12}


def test_reschedule_without_resume(tmp_path):
    with pytest.raises(RunError, match=r"--reschedule: changes a run that is resumed\. Add --resume"):
        session(configure(), tmp_path / "run", reschedule=True)


# --- What a checkpoint notes ------------------------------------------------------------------------------------------------------


def test_where_a_checkpoint_stands(tmp_path):
    """14 rows in steps of 4: step 5 is the first of the second epoch."""
    config, out = configure(UPO), tmp_path / "run"
    stopped(config, out, step=5)
    origin = read_checkpoint(out / "checkpoints" / "step-000005").origin
    assert origin["order"] == {"seed": 0, "batch_size": 4, "rows": 14, "epoch": 1, "row": 4}
    assert origin["schedule"] == {"name": "constant", "lr": 0.5, "warmup_steps": 0, "steps": 8}
    assert origin["random"] == {"seed": 0}
    assert origin["identity"] == manifest(out)["identity"] and {"data.train", "data.eval", "rewards", "order", "model"} <= set(origin["identity"])
    assert origin["reference"] == manifest(out)["reference"]["keys"] and sorted(origin["reference"]) == ["eval", "train"]


def test_running_states_of_losses_come_back(tmp_path):
    """A learner may have a fourth part; it is absent where it has none."""

    class Running(FakeLearner):
        def __init__(self, config: RunConfig) -> None:
            super().__init__(config)
            self.running = {"0.bco.delta": np.zeros(())}

        def step(self, batch: Any, lr: float) -> Any:
            self.running = {"0.bco.delta": np.array(0.9 * self.running["0.bco.delta"] + batch.step)}
            return super().step(batch, lr)

        def state(self) -> Any:
            return {**super().state(), "losses": dict(self.running)}

        def load_state(self, state: Any) -> None:
            self.running = dict(state["losses"])
            super().load_state(state)

    config, learner = configure(train={"save_every": 3}), Running(configure())
    whole = Running(config)
    session(config, tmp_path / "whole", learner=whole).run()
    learner.before_step = lambda s: signal.raise_signal(signal.SIGINT) if s == 4 else None
    with pytest.raises(KeyboardInterrupt):
        session(config, tmp_path / "run", learner=learner).run()
    resumed = Running(config)
    session(config, tmp_path / "run", learner=resumed, resume=True).run()
    assert resumed.steps == [5, 6, 7] and resumed.running["0.bco.delta"] == whole.running["0.bco.delta"] != 0
    assert resumed.running["0.bco.delta"].dtype == np.float64


def test_the_reference_moves_with_the_run(tmp_path, monkeypatch):
    """Another machine has no cache; the run itself carries what the difference is measured to."""
    config, out = configure(KTO), tmp_path / "run"
    stopped(config, out)
    monkeypatch.setenv("UPO_CACHE", str(tmp_path / "another machine"))
    learner, listener = FakeLearner(config), Listener()
    learner.reference_offset = 0.25
    resumed = session(configure(KTO, backend="mlx"), out, learner=learner, resume=True, reporter=listener)
    said = "computed anew, as backend, device or dtype changed; largest difference to the earlier ones 0.25 nats."
    assert [text for text in listener.infos if "computed anew" in text] == [f"Reference ({split}): {said}" for split in ("train", "eval")]
    resumed.run()
    assert manifest(out)["reference"]["keys"] == read_checkpoint(out / "checkpoints" / "step-000008").origin["reference"]

    other = tmp_path / "again"
    stopped(config, other)
    monkeypatch.setenv("UPO_CACHE", str(tmp_path / "a third"))
    listener, learner = Listener(), FakeLearner(config)
    session(config, other, learner=learner, resume=True, reporter=listener)
    assert not [text for text in listener.infos if "computed anew" in text], "the same machine in all that counts"
    monkeypatch.setenv("UPO_CACHE", str(tmp_path / "a fourth"))
    learner.reference_offset = 1e-3
    session(config, other, learner=learner, resume=True, reporter=listener)
    assert any(re.search(r"on a machine that rounds otherwise; largest difference to the earlier ones 0\.00", text) for text in listener.infos)


def test_who_did_which_steps(tmp_path):
    """Stretches follow one another without overlap, also where steps were done twice or a process was killed."""
    config, out = configure(train={"save_every": 2, "keep_checkpoints": 5}), tmp_path / "run"
    stopped(config, out, step=5)
    stopped(config, out, step=7, resume=True)
    for step in (5, 6, 7):
        path = out / "checkpoints" / f"step-{step:06d}" / "state.json"
        path.write_text(path.read_text().replace('"row"', '"raw"'))
    listener = Listener()
    session(config, out, resume=True, reporter=listener).run()
    assert [(s["from_step"], s["to_step"]) for s in manifest(out)["sessions"]] == [(0, 4), (4, 4), (4, 8)]
    assert "Going on after step 4 of 8 (1-4 by torch on cpu)." in listener.infos
    assert manifest(out)["latest"] == "step-000008"


def test_a_process_that_ended_before_it_could_say_what_it_did(tmp_path, monkeypatch):
    """The checkpoint of step 4 is there, the manifest still says 2."""
    config, out = configure(train={"save_every": 2}), tmp_path / "run"

    class Killed(BaseException):
        pass

    def note(self: Session, step: int, folder: Path | None = None, original: Any = Session._note) -> None:
        if step == 4:
            raise Killed
        original(self, step, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "_note", note)
        with pytest.raises(Killed):
            session(config, out).run()
    assert checkpoints(out) == [2, 4] and manifest(out)["sessions"][0]["to_step"] == 2 and manifest(out)["latest"] == "step-000002"
    session(config, out, resume=True).run()
    assert [(s["from_step"], s["to_step"]) for s in manifest(out)["sessions"]] == [(0, 4), (4, 8)]


def test_a_polite_end_from_outside(tmp_path):
    """SIGTERM, which schedulers of clusters send, saves as Ctrl-C does."""
    config, out = configure(), tmp_path / "run"
    handler = signal.getsignal(signal.SIGTERM)
    listener = stopped(config, out, step=3, number=signal.SIGTERM)
    assert checkpoints(out) == [3] and f"Go on with: upo train --resume --out {out}" in listener.warnings[-1]
    assert signal.getsignal(signal.SIGTERM) is handler


# --- The best checkpoint ----------------------------------------------------------------------------------------------------------

EVALUATED = {"epochs": 4, "eval_every": 2, "save_every": 5, "keep_checkpoints": 1}


def rising_and_falling(learner: FakeLearner, best: int) -> FakeLearner:
    """After step `best` every update goes the wrong way."""
    learner.before_step = lambda step: learner.adapter.update({A: learner.adapter[A] * (1.0 if step < best else -1.0)})
    return learner


@pytest.mark.parametrize("metric, sign", [("loss", 1), ("accuracy", -1), ("margin", -1), ("logp/chosen", -1)])
def test_the_best_is_kept_beside_the_newest(tmp_path, metric, sign):
    config, out = configure(train={**EVALUATED, "keep_best": metric}), tmp_path / "run"
    summary = session(config, out, learner=rising_and_falling(FakeLearner(config), 7)).run()
    values = {line["step"]: sign * line[metric] for line in lines(out, evaluation=True) if line["step"] > 0}
    best = min(values, key=lambda step: (values[step], step))
    assert best not in (5, 10, 15), "between two checkpoints of the usual cadence"
    assert checkpoints(out) == sorted({best, 16}) and best != 16
    assert summary["best"]["step"] == best and summary["best"][metric] == sign * values[best]
    assert summary["best"]["checkpoint"] == str(out / "checkpoints" / f"step-{best:06d}")


def test_the_best_survives_a_stop(tmp_path):
    config = configure(train={**EVALUATED, "keep_best": "loss"})
    session(config, tmp_path / "whole", learner=rising_and_falling(FakeLearner(config), 7)).run()
    for stop in (6, 7, 8, 9, 13):
        out = tmp_path / f"run{stop}"
        learner = rising_and_falling(FakeLearner(config), 7)
        turn = learner.before_step

        def at(step: int, turn: Any = turn, stop: int = stop) -> None:
            turn(step)
            if step == stop:
                raise OSError("gone")

        learner.before_step = at
        with pytest.raises(OSError, match="gone"):
            session(config, out, learner=learner).run()
        session(config, out, learner=rising_and_falling(FakeLearner(config), 7), resume=True).run()
        assert checkpoints(out) == checkpoints(tmp_path / "whole") and lines(out) == lines(tmp_path / "whole")


def test_a_process_that_ended_before_it_removed_old_ones(tmp_path, monkeypatch):
    config, out = configure(train={"save_every": 3, "keep_checkpoints": 1}), tmp_path / "run"

    def gone(run: Run, step: int, *rest: Any) -> None:
        if step == 8:
            raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "prune", gone)
        with pytest.raises(OSError, match="gone"):
            session(config, out).run()
    assert checkpoints(out) == [3, 6, 8] and not (out / "summary.json").exists()
    session(config, out, resume=True).run()
    assert checkpoints(out) == [8]


def test_a_metric_that_will_not_be_there(tmp_path):
    def refuse(match: str, config: RunConfig, rows: Rows) -> None:
        with pytest.raises(ConfigError, match=match):
            session(config, tmp_path / "run", rows)
        assert not (tmp_path / "run").exists()

    both = Rows(pairs(14), pairs(4, seed=1))
    refuse(r"train\.keep_best: loss is compared.*there are no held-out rows", configure(train={**EVALUATED, "keep_best": "loss"}), Rows(pairs(14)))
    refuse(r"train\.keep_best: .*train\.eval_every is 0", configure(train={"keep_best": "loss"}), both)
    refuse(r"no loss/auxiliary on these held-out rows\. Possible: loss, loss/preference, accuracy, margin, logp/chosen", configure(train={**EVALUATED, "keep_best": "loss/auxiliary"}), both)
    with pytest.raises(ConfigError, match=r"train\.keep_best"):
        configure(train={**EVALUATED, "keep_best": "loss/prefrence"})


# --- Disks that refuse ------------------------------------------------------------------------------------------------------------


def test_a_run_on_a_full_disk(tmp_path, monkeypatch):
    """The second checkpoint does not fit: one clear line, and after making room the run goes on from the first."""
    config, out = configure(UPO, train={"save_every": 3}), tmp_path / "run"
    session(config, tmp_path / "whole").run()
    learner = FakeLearner(config)

    def fill(step: int) -> None:
        if step == 5:
            monkeypatch.setattr(os, "fsync", full)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    learner.before_step = fill
    with pytest.raises(RunError) as caught:
        session(config, out, learner=learner).run()
    assert re.fullmatch(
        rf"{out}/checkpoints/step-000006: cannot be written \(No space left on device\)\. The one of step 3 is untouched\. "
        rf"Make room, then go on: upo train --resume --out {out}",
        str(caught.value),
    )
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    assert checkpoints(out) == [3] and not [p for p in out.rglob(".*")]
    session(config, out, resume=True).run()
    assert lines(out) == lines(tmp_path / "whole") and result(out) == result(tmp_path / "whole")
