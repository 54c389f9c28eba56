"""The run folder: what is written, what is refused, what survives damage."""

from __future__ import annotations

import errno
import json
import os
import re

import numpy as np
import pytest
from fake_learner import FakeLearner, configure

from upo.errors import RunError
from upo.training import files, inputs
from upo.training.checkpoint import read_checkpoint, seal
from upo.training.files import file_hash
from upo.training.inputs import Inputs
from upo.training.reporter import Recorder, Silent
from upo.training.run import Run

MANIFEST = {"identity": {}, "steps": 9, "reference": {"keys": {}}, "sessions": []}
SECONDS = {"reference": 1.0, "train": 2.0, "total": 4.0}


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "a" / "run")
    run.create("model: fake\n", MANIFEST, Inputs())
    return run


def save(run: Run, step: int, value: float = 0.0):
    learner = FakeLearner(configure())
    state = learner.state()
    state["optimizer"] = {name: np.full_like(array, value + step) for name, array in state["optimizer"].items()}
    return run.save(step, state, learner.adapter_config(), SECONDS), state


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


def kept(run: Run) -> list[str]:
    return sorted(path.name for path in (run.path / "checkpoints").iterdir())


def test_only_the_newest_are_kept_and_those_named(run):
    for step in (1, 5, 20, 100):
        save(run, step)
    run.prune(100, 2, besides=[5])
    assert kept(run) == ["step-000005", "step-000020", "step-000100"]
    run.prune(100, 1)
    assert kept(run) == ["step-000100"]
    save(run, 50)
    run.prune(50, 1)  # the run has gone back to before step 100, whose checkpoint was passed over
    assert kept(run) == ["step-000050", "step-000100"]
    assert run.last_step() == 100 and run.last_step(99) == 50 and run.last_step(49) is None
    assert run.newest(Silent()).step == 100


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
    assert "Passed over" in recorder.warnings[0]
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

    monkeypatch.setattr("upo.training.checkpoint.sync", killed)
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
    (folder / "state.json").write_text(json.dumps(seal(content)))
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
        run.create("", {}, Inputs())
    assert (run.path / "config.yaml").read_text() == "model: fake\n"
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match="is a file"):
            Run(folder).check_new()
    with pytest.raises(RunError, match=r"holds no run \(config\.yaml and manifest\.json missing\)"):
        Run(tmp_path / "none").check_resumable()
    run.check_resumable()
    run.check_unfinished(9)
    run.write_json("summary.json", {"steps": 8})
    run.check_unfinished(9)  # the result of a run that was made longer since
    with pytest.raises(RunError, match=r"is finished.*--set train\.epochs"):
        run.check_unfinished(8)
    (run.path / "manifest.json").write_text("[")
    with pytest.raises(RunError, match=r"manifest\.json: cannot be read"):
        run.manifest()


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {**MANIFEST, "sessions": [{"from_step": -1}]},
        {**MANIFEST, "sessions": [3]},
        {**MANIFEST, "steps": "9"},
        {**MANIFEST, "steps": True},
        {**MANIFEST, "identity": None},
        {**MANIFEST, "reference": {"keys": {"train": "../../../etc/passwd"}}},
        {**MANIFEST, "reference": []},
        {**MANIFEST, "latest": "../../elsewhere"},
        {**MANIFEST, "value_fit": {"loss": float("nan")}},
        {**MANIFEST, "upo": "\ud800"},
    ],
)
def test_a_manifest_of_something_else(run, content):
    (run.path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"manifest\.json: .*The run cannot be resumed"):
        run.manifest()


def test_a_folder_with_other_files_can_hold_a_run(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    Run(tmp_path).create("model: fake\n", MANIFEST, Inputs())
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("written", range(5))
def test_a_process_that_ended_while_it_made_the_folder(tmp_path, monkeypatch, written):
    """Whatever was there by then, the same command works again; from the configuration on it is a run."""
    run, left = Run(tmp_path / "run"), iter(range(written))

    class Killed(BaseException):
        pass

    def dying(original):
        def write(*arguments, **options):
            if next(left, None) is None:
                raise Killed
            return original(*arguments, **options)

        return write

    for name in ("touch", "mkdir"):
        monkeypatch.setattr(f"pathlib.Path.{name}", dying(getattr(type(tmp_path), name)))
    monkeypatch.setattr("upo.training.run.write_text", dying(files.write_text))
    monkeypatch.setattr("upo.training.inputs.write_inputs", dying(inputs.write_inputs))
    with pytest.raises(Killed):
        run.create("model: fake\n", MANIFEST, Inputs())
    monkeypatch.undo()
    run.check_new()
    run.create("model: fake\n", MANIFEST, Inputs())
    with pytest.raises(RunError, match="holds a run already"):
        run.check_new()


@pytest.mark.parametrize("name", ["manifest.json", "inputs.safetensors", "metrics.jsonl", "summary.json", "adapter", "config.yaml"])
def test_files_of_others_are_left_alone(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(RunError, match=f"holds a run already .{name}"):
        Run(tmp_path).check_new()


# --- Disks that refuse ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code, words", [(errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only file system"), (errno.EFBIG, "File too large")])
@pytest.mark.parametrize("failing", range(1, 5))
def test_a_disk_that_is_full(run, monkeypatch, code, words, failing):
    """At whichever file of a checkpoint it happens: one line, nothing half-written, the earlier one as it was."""
    folder, _ = save(run, 5)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calls = iter(range(1, 100))
    original = os.fsync

    def full(handle):
        if next(calls) > failing:  # the first is that of metrics.jsonl
            raise OSError(code, os.strerror(code))
        original(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError) as caught:
        save(run, 10)
    monkeypatch.undo()
    message = str(caught.value)
    assert message.startswith(f"{run.path}/checkpoints/step-000010: cannot be written ({words}). The one of step 5 is untouched.")
    assert message.endswith(f"upo train --resume --out {run.path}") and "\n" not in message
    assert kept(run) == ["step-000005"] and {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert run.newest(Silent()).step == 5
    save(run, 10)
    assert run.newest(Silent()).step == 10


def test_other_files_on_a_full_disk(run, monkeypatch):
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    learner = FakeLearner(configure())
    for name, write in {
        "manifest.json": lambda: run.write_json("manifest.json", {}),
        "config.yaml": lambda: run.write("config.yaml", "x"),
        "inputs.safetensors": lambda: run.write_inputs(Inputs({"train": np.ones(3, np.uint64)})),
        "adapter": lambda: run.write_result(learner.state()["adapter"], learner.adapter_config()),
        "metrics.jsonl": lambda: run.truncate(0),
    }.items():
        with pytest.raises(RunError, match=rf"{name}: cannot be written \(No space left on device\)"):
            write()
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_a_folder_that_cannot_be_written_to(tmp_path, run, monkeypatch):
    """Said before anything is loaded. The test may run as root, whom modes do not stop."""
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path) and str(path) != str(run.path))
    with pytest.raises(RunError, match=rf"--out {tmp_path}/new/run: {tmp_path} cannot be written to \(no permission, or a read-only file system\)"):
        Run(tmp_path / "new" / "run").check_new()
    with pytest.raises(RunError, match=r"--resume: --out .* cannot be written to"):
        run.check_resumable()
