"""Checkpoints that come from anywhere: what is in them, and that nothing damaged or forged is ever loaded or ends in a traceback."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_learner import UPO, FakeLearner, Rows, configure, pairs

from upo.errors import RunError, UpoError
from upo.training.checkpoint import FILES, read_checkpoint, seal, write_checkpoint
from upo.training.reporter import Recorder, Silent
from upo.training.run import Run
from upo.training.session import Session

SECONDS = {"reference": 1.0, "train": 2.0, "total": 4.0}
LOSSES = {"0.bco.delta": np.array(0.25), "1.alpha_dpo.mean": np.array([0.1, 1 / 3], np.float64)}


@pytest.fixture(autouse=True)
def fast(tmp_path, monkeypatch):
    monkeypatch.setenv("UPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint with every kind of file."""
    learner = FakeLearner(configure(UPO))
    path = tmp_path / "checkpoints" / "step-000007"
    path.parent.mkdir()
    write_checkpoint(path, 7, {**learner.state(), "losses": LOSSES}, learner.adapter_config(), SECONDS, {"order": {"row": 3}, "identity": {"model": "w0"}})
    return path


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change state.json as someone would who knows how to seal it."""
    content = json.loads((folder / "state.json").read_text())
    change(content)
    (folder / "state.json").write_text(json.dumps(seal(content)))


def test_everything_comes_back(folder):
    assert sorted(p.name for p in folder.iterdir()) == sorted([*FILES.values(), "adapter_config.json", "state.json"])
    checkpoint = read_checkpoint(folder)
    assert (checkpoint.step, checkpoint.seconds, checkpoint.origin) == (7, SECONDS, {"order": {"row": 3}, "identity": {"model": "w0"}})
    state = checkpoint.state()
    expected = {**FakeLearner(configure(UPO)).state(), "losses": LOSSES}
    assert list(state) == list(FILES) and all(sorted(state[part]) == sorted(expected[part]) for part in FILES)
    for part, arrays in expected.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(state[part][name], array)
            assert (state[part][name].dtype, state[part][name].shape) == (array.dtype, array.shape)


def test_parts_without_arrays_have_no_file(tmp_path):
    learner = FakeLearner(configure())
    path = tmp_path / "step-000001"
    write_checkpoint(path, 1, {**learner.state(), "losses": {}}, learner.adapter_config(), SECONDS, {})
    assert not (path / "value_head.safetensors").exists() and not (path / "losses.safetensors").exists()
    state = read_checkpoint(path).state()
    assert state["value_head"] == {} and "losses" not in state


def test_a_file_that_is_not_listed_is_not_read(tmp_path):
    learner = FakeLearner(configure())
    path = tmp_path / "step-000001"
    write_checkpoint(path, 1, learner.state(), learner.adapter_config(), SECONDS, {})
    shutil.copy(path / "optimizer.safetensors", path / "value_head.safetensors")
    assert read_checkpoint(path).state()["value_head"] == {}


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda c: c.update(step=8), "that of step 8, not of this folder"),
        (lambda c: c.update(step="7"), "that of step 7"),
        (lambda c: c.update(step=10**400), "not of this folder"),
        (lambda c: c.update(format=2), "another version of upo"),
        (lambda c: c.update(seconds={"reference": 1.0, "train": 2.0}), "seconds"),
        (lambda c: c.update(seconds={**SECONDS, "total": float("nan")}), "seconds"),
        (lambda c: c.update(seconds={**SECONDS, "total": 10**400}), "seconds"),
        (lambda c: c.update(seconds=3), "seconds"),
        (lambda c: c.update(files=[]), "does not list its files"),
        (lambda c: c["files"].update({"optimizer.safetensors": 3}), "does not list its files"),
        (lambda c: c["files"].pop("optimizer.safetensors"), "lists no optimizer.safetensors"),
        (lambda c: c["files"].pop("adapter_config.json"), "lists no adapter_config.json"),
        (lambda c: c["files"].update({"../../../etc/passwd": "0"}), "etc/passwd is missing"),
        (lambda c: c["files"].update({"/etc/passwd": "0"}), "/etc/passwd is missing"),
        (lambda c: c["files"].update({"..": "0"}), r"\.\. is missing"),
        (lambda c: c["files"].update({"": "0"}), "is missing"),
        (lambda c: c["files"].update({"a\0b": "0"}), "is missing"),
        (lambda c: c.update(order=[1, 2]), "order is not a mapping"),
        (lambda c: c.update(identity="w0"), "identity is not a mapping"),
    ],
)
def test_forged_contents(folder, change, match):
    rewrite(folder, change)
    with pytest.raises(RunError, match=match) as caught:
        read_checkpoint(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "[" * 100_000, '{"step": 7}', "\ufeff{}", '{"sha256": "0", "step": 7}'])
def test_a_state_that_is_none(folder, text):
    (folder / "state.json").write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match=r"state\.json"):
        read_checkpoint(folder)


def test_files_that_are_something_else(folder):
    path = folder / "optimizer.safetensors"
    path.unlink()
    path.mkdir()
    with pytest.raises(RunError, match=r"optimizer\.safetensors is missing"):
        read_checkpoint(folder)
    path.rmdir()
    os.mkfifo(path)  # reading it would wait for ever
    with pytest.raises(RunError, match=r"optimizer\.safetensors is missing"):
        read_checkpoint(folder)


# --- Fuzz -------------------------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def damaged(draw: random.Random, data: bytes, other: bytes) -> bytes | None:
    """The bytes of a file after an accident; None: the file is gone."""
    place = draw.randrange(len(data))
    length = draw.randrange(1, 64)
    accidents: list[Callable[[], bytes | None]] = [
        lambda: data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :],
        lambda: data[:place],
        lambda: data + draw.randbytes(length) + b"x",
        lambda: data[:place] + bytes(length) + data[place + length :],
        lambda: data[:place] + draw.randbytes(length) + data[place:],
        lambda: data[:place] + data[place + length :],
        lambda: (2 ** draw.randrange(20, 64)).to_bytes(8, "little") + data[8:],  # the length of a safetensors header
        lambda: draw.randbytes(len(data)),
        lambda: other,
        lambda: b"",
        lambda: None,
    ]
    return draw.choice(accidents)()


@pytest.fixture
def stopped(tmp_path) -> Path:
    """A run of UPO with one checkpoint."""
    config, out = configure(UPO, train={"save_every": 3, "eval_every": 2}), tmp_path / "run"
    learner = FakeLearner(config)

    def stop(step: int) -> None:
        if step == 4:
            raise RunError("stopped")

    learner.before_step = stop
    with pytest.raises(RunError, match="stopped"):
        Session(config, out, learner=learner, data=Rows(pairs(14), pairs(3, seed=1))).run()
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000003"]
    return out


def resume(out: Path) -> Session:
    config = configure(UPO, train={"save_every": 3, "eval_every": 2})
    return Session(config, out, learner=FakeLearner(config), data=Rows(pairs(14), pairs(3, seed=1)), resume=True)


def test_damaged_checkpoints_are_refused(stopped):
    """180 accidents to each of its files in turn: refused in one line that names the file, and the run folder is left as it is."""
    resume(stopped)  # as it is, it is fine
    folder, draw = stopped / "checkpoints" / "step-000003", random.Random(3)
    names, whole = sorted(p.name for p in folder.iterdir()), contents(folder)
    assert len(names) == 5
    for round in range(180):
        name = names[round % len(names)]
        after = damaged(draw, whole[name], whole[draw.choice([n for n in names if n != name])])
        if after == whole[name]:  # zeros over zeros
            after = whole[name][:-1]
        (folder / name).unlink() if after is None else (folder / name).write_bytes(after)
        before = contents(stopped)
        with pytest.raises(RunError) as caught:
            read_checkpoint(folder)
        assert str(caught.value).startswith(f"{folder}: ") and name in str(caught.value) and "\n" not in str(caught.value)
        assert Run(stopped).last_step() == 3
        with pytest.raises(RunError, match=r"^--resume: no checkpoint is complete\. "):
            resume(stopped)
        assert contents(stopped) == before
        (folder / name).write_bytes(whole[name])
    resume(stopped)


@pytest.mark.parametrize("name, rounds", [("manifest.json", 60), ("metrics.jsonl", 20), ("inputs.safetensors", 20), ("config.yaml", 60)])
def test_a_damaged_run_folder_is_refused_or_resumed(stopped, name, rounds):
    """Accidents to each of the other files: a clear error, or the run goes on; never anything else."""
    path, draw = stopped / name, random.Random(name)
    whole, other = path.read_bytes(), (stopped / "checkpoints" / "step-000003" / "optimizer.safetensors").read_bytes()
    ends = {"refused": 0, "resumed": 0}
    for _ in range(rounds):
        shutil.rmtree(work := stopped.with_name("work"), ignore_errors=True)
        shutil.copytree(stopped, work)
        after = damaged(draw, whole, other)
        (work / name).unlink() if after is None else (work / name).write_bytes(after)
        try:
            session = resume(work)
        except UpoError as error:
            assert str(error)
            ends["refused"] += 1
        else:
            assert session.progress.step == 3 and session.run()["steps"] == 8
            ends["resumed"] += 1
    vital = name in ("manifest.json", "config.yaml")
    assert ends["refused"] > 0.8 * rounds if vital else ends["refused"] == 0, ends


def test_lost_metrics_are_said(stopped):
    lines = (stopped / "metrics.jsonl").read_text().splitlines()
    (stopped / "metrics.jsonl").write_text("\n".join(["\x00\x01", lines[0], '{"step": NaN}', '{"step": "2"}', *lines[2:], "[]"]) + "\n")
    session = resume(stopped)
    recorder = Recorder(Silent())
    session.reporter = recorder
    session.run()
    assert [w for w in recorder.warnings if "metrics.jsonl" in w] == [
        f"{stopped}/metrics.jsonl: 1 of 3 steps are missing (the first is 1); they cannot be made again."
    ]
    assert [json.loads(line)["step"] for line in (stopped / "metrics.jsonl").read_text().splitlines()][:4] == [0, 2, 2, 3]
