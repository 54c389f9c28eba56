"""The run folder: what is written, what is refused, what survives damage."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from fake_learner import FakeLearner, configure

from upo.errors import RunError
from upo.train.reporter import Recorder, Silent
from upo.train.run import Run, file_hash, read_checkpoint

SECONDS = {"reference": 1.0, "train": 2.0, "total": 4.0}


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "a" / "run")
    run.create("model: fake\n", {"sessions": []})
    return run


def save(run: Run, step: int, keep: int | None = 2, value: float = 0.0):
    learner = FakeLearner(configure())
    state = learner.state()
    state["optimizer"] = {name: np.full_like(array, value + step) for name, array in state["optimizer"].items()}
    return run.save(step, state, learner.adapter_config(), SECONDS, keep), state


def test_a_checkpoint_comes_back(run):
    folder, state = save(run, 7)
    assert folder.name == "step-000007"
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json"]
    checkpoint = read_checkpoint(folder)
    assert (checkpoint.step, checkpoint.seconds) == (7, SECONDS)
    back = checkpoint.state()
    assert back["value_head"] == {}
    for part in ("adapter", "optimizer"):
        assert sorted(back[part]) == sorted(state[part])
        for name, array in state[part].items():
            np.testing.assert_array_equal(back[part][name], array)
            assert back[part][name].dtype == np.float32


def test_only_the_newest_are_kept(run):
    for step in (1, 5, 20, 100):
        save(run, step)
    assert [f.name for f in sorted((run.path / "checkpoints").iterdir())] == ["step-000020", "step-000100"]
    save(run, 110, keep=None)
    assert run.last_step() == 110 and len(list((run.path / "checkpoints").iterdir())) == 3
    assert run.newest(Silent()).step == 110


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors", "adapter_config.json", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_damaged_checkpoint_is_named_and_passed_over(run, name, damage):
    save(run, 5)
    folder, _ = save(run, 10)
    path = folder / name
    if damage == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    recorder = Recorder(Silent())
    if name == "state.json" and damage == "changed":
        path.write_text("{")
    assert run.newest(recorder).step == 5
    assert len(recorder.warnings) == 1 and "step-000010" in recorder.warnings[0] and name in recorder.warnings[0]
    save(run, 10)  # when the run comes by again it is written anew
    assert run.newest(Silent()).step == 10


def test_a_complete_checkpoint_is_not_written_twice(run):
    folder, _ = save(run, 5)
    before = file_hash(folder / "optimizer.safetensors")
    save(run, 5, value=100.0)
    assert file_hash(folder / "optimizer.safetensors") == before


def test_an_interrupted_write_leaves_nothing_to_load(run, monkeypatch):
    save(run, 5)

    def killed(path):
        if path.name == ".tmp-step-000010":  # all files are there, the rename is still to come
            raise KeyboardInterrupt

    monkeypatch.setattr("upo.train.run.sync", killed)
    with pytest.raises(KeyboardInterrupt):
        save(run, 10)
    monkeypatch.undo()
    assert run.newest(Silent()).step == 5
    assert any(p.name.startswith(".") for p in (run.path / "checkpoints").iterdir())
    run.sweep()
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["step-000005"]


def test_a_checkpoint_cannot_point_out_of_its_folder(run):
    folder, _ = save(run, 5)
    content = json.loads((folder / "state.json").read_text())
    content["files"]["../../config.yaml"] = file_hash(run.path / "config.yaml")
    (folder / "state.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=re.escape("../../config.yaml is missing")):
        read_checkpoint(folder)


def test_metrics_are_truncated_to_a_step(run):
    for record in ({"step": 0, "eval": True}, {"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": 1e-7}, {"step": 2, "eval": True}, {"step": 3, "loss": 1.0}):
        run.append(record)
    lines = run.metrics.read_text().splitlines()
    with run.metrics.open("a") as file:
        file.write('{"step": 4, "lo')  # the process ended here
    assert [r["step"] for r in run.records()] == [0, 1, 2, 2, 3]
    assert [r["step"] for r in run.truncate(2)] == [0, 1, 2, 2]
    assert run.metrics.read_text().splitlines() == lines[:4]


def test_refusals(tmp_path, run):
    with pytest.raises(RunError, match=r"holds a run already \(config\.yaml, manifest\.json.*upo train --resume --out"):
        run.check_new()
    with pytest.raises(RunError, match="holds a run already"):
        run.create("", {})
    assert (run.path / "config.yaml").read_text() == "model: fake\n"
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="this is a file"):
        Run(tmp_path / "file").check_new()
    with pytest.raises(RunError, match=r"holds no run \(config\.yaml and manifest\.json missing\)"):
        Run(tmp_path / "none").check_resumable()
    run.check_resumable()
    run.write_json("summary.json", {})
    with pytest.raises(RunError, match="is finished"):
        run.check_resumable()
    (run.path / "manifest.json").write_text("[")
    with pytest.raises(RunError, match=r"manifest\.json: cannot be read"):
        run.manifest()


def test_a_folder_with_other_files_can_hold_a_run(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    Run(tmp_path).create("model: fake\n", {})
    assert (tmp_path / "notes.txt").read_text() == "mine"
