"""`upo convert`: what it prints, how it ends, and the comparison of logits with the stock loaders."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from convert_cases import TARGETS, edit, mlx_folder, peft_folder, weights_of
from interpreters import need_backend
from upo_cli.main import main

from upo import tensors
from upo.convert import verify


def upo(*arguments: object):
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


def test_result_on_stdout_notes_on_stderr(tmp_path: Path) -> None:
    source = peft_folder(tmp_path / "a")
    done = upo(source, "--to", "mlx", "--out", tmp_path / "b")
    assert done.exit_code == 0, done.stderr
    assert "mlx adapter (8 modules, rank 4, F32); scale * B * A differs by" in done.stdout
    assert "the base model is not at hand" in done.stderr and "not at hand" not in done.stdout
    quiet = upo(source, "--to", "mlx", "--out", tmp_path / "c", "-q")
    assert quiet.exit_code == 0 and quiet.stderr == ""


def test_json(tmp_path: Path) -> None:
    done = upo(mlx_folder(tmp_path / "a"), "--to", "peft", "--out", tmp_path / "b", "--dtype", "float16", "--json")
    found = json.loads(done.stdout)
    assert (found["source_format"], found["target_format"], found["modules"], found["rank"], found["dtypes"]) == ("mlx", "peft", 8, 4, ["F16"])
    assert found["out"] == str(tmp_path / "b") and 0 < found["difference"] < 2e-3 and found["verdict"] is None and len(found["notes"]) == 1


def test_errors_are_one_line_and_leave_nothing(tmp_path: Path) -> None:
    source = peft_folder(tmp_path / "a")
    for arguments, code, message in (
        ((source, "--to", "gguf", "--out", tmp_path / "b"), 2, "Invalid value for '--to'"),
        ((source, "--to", "mlx"), 2, "Missing option '--out'"),
        ((tmp_path / "none", "--to", "mlx", "--out", tmp_path / "b"), 1, "no such adapter folder"),
        ((source, "--to", "mlx", "--out", source), 1, "exists already"),
        ((source, "--to", "mlx", "--out", tmp_path / "b", "--verify"), 1, "--verify: needs the base model"),
        ((source, "--to", "mlx", "--out", tmp_path / "b", "--base", tmp_path / "none"), 1, "no such folder"),
    ):
        done = upo(*arguments)
        assert done.exit_code == code and message in done.stderr and done.stdout == "", (message, done.stderr)
        assert "Traceback" not in done.stderr
    edit(source, bias="all")
    done = upo(source, "--to", "mlx", "--out", tmp_path / "b")
    assert done.exit_code == 1 and len(done.stderr.splitlines()) == 1 and "trained biases" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_target_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "b"))

    source = peft_folder(tmp_path / "a")
    monkeypatch.setattr(Path, "mkdir", refuse)
    done = upo(source, "--to", "mlx", "--out", tmp_path / "b")
    assert done.exit_code == 1 and "Permission denied" in done.stderr and "Traceback" not in done.stderr


# At mlx-lm's scale of 20 the tiny model's logits are a hundred, and their rounding is no measure of anything.
@pytest.mark.parametrize(("make", "to"), [(peft_folder, "mlx"), pytest.param(partial(mlx_folder, scale=2.0), "peft", marks=pytest.mark.slow)])
def test_verify(tmp_path: Path, tiny_llama: Path, make, to: str) -> None:
    need_backend("torch"), need_backend("mlx")
    source = make(tmp_path / "a", [*TARGETS, "lm_head"])
    done = upo(source, "--to", to, "--out", tmp_path / "b", "--base", tiny_llama, "--verify", "--json")
    assert done.exit_code == 0, done.stderr
    verdict = json.loads(done.stdout)["verdict"]
    assert verdict["tokens"] > 100 and verdict["adapted"] < 0.1 * verdict["limit"] and verdict["base"] < 1e-4 and verdict["effect"] > 0.3


def test_verify_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> None:
    logits = {"torch": (np.zeros((3, 5)), np.ones((3, 5)) * 2), "mlx": (np.zeros((3, 5)) + 1e-5, np.ones((3, 5)) * 2 + 2e-5)}
    monkeypatch.setattr(verify, "installed", lambda name: True)
    monkeypatch.setattr(verify, "_logits", lambda name, *_: logits[name])
    source = peft_folder(tmp_path / "a")
    done = upo(source, "--to", "mlx", "--out", tmp_path / "b", "--base", tiny_llama, "--verify")
    assert done.exit_code == 0 and "differ by 2e-05 at most (without adapter 1e-05); the adapter moves them by 2" in done.stdout
    logits["mlx"] = (logits["torch"][0], logits["torch"][1] + 3e-3)  # above 1e-3 of the largest logit
    done = upo(source, "--to", "mlx", "--out", tmp_path / "c", "--base", tiny_llama, "--verify")
    assert done.exit_code == 1 and "logits differ by 0.003 (at most 0.002 is allowed; 0 without adapter, which moves them by 2)" in done.stderr
    # An adapter that does little must not pass because it is lost.
    logits |= {"torch": (np.full((3, 5), 30.0), np.full((3, 5), 30.05)), "mlx": (np.full((3, 5), 30.0), np.full((3, 5), 30.02))}
    done = upo(source, "--to", "mlx", "--out", tmp_path / "c", "--base", tiny_llama, "--verify")
    assert done.exit_code == 1 and "at most 0.0025 is allowed" in done.stderr
    logits["mlx"] = (np.full((3, 5), np.nan), np.full((3, 5), np.nan))
    assert upo(source, "--to", "mlx", "--out", tmp_path / "c", "--base", tiny_llama, "--verify").exit_code == 1
    monkeypatch.setattr(verify, "installed", lambda name: name == "torch")
    done = upo(source, "--to", "mlx", "--out", tmp_path / "c", "--base", tiny_llama, "--verify")
    assert done.exit_code == 1 and 'pip install "upo[mlx]"' in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "to"), [(peft_folder, "mlx"), (mlx_folder, "peft")])
def test_verify_sees_a_wrong_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, make, to: str) -> None:
    """The right files are exchanged for those of another adapter before the loaders see them."""
    need_backend("torch"), need_backend("mlx")
    import upo.convert.run as run

    write = run.write_files

    def other(files, folder: Path, weights: str, metadata) -> None:
        write(files, folder, weights, metadata)
        arrays = weights_of(folder)
        name = min(arrays)
        tensors.write(folder / weights, {n: t.raw * (1.5 if n == name else 1.0) for n, t in arrays.items()})

    monkeypatch.setattr(run, "write_files", other)
    done = upo(make(tmp_path / "a"), "--to", to, "--out", tmp_path / "b", "--base", tiny_llama, "--verify")
    assert done.exit_code == 1 and "logits differ by" in done.stderr and "Nothing was written" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_verify_names_what_a_loader_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> None:
    need_backend("torch"), need_backend("mlx")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    done = upo(peft_folder(tmp_path / "a"), "--to", "mlx", "--out", tmp_path / "b", "--base", tiny_llama, "--verify")
    assert done.exit_code == 1 and "--verify: torch could not load" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_a_real_model(tmp_path: Path, smollm2: Path, dora: bool) -> None:
    """SmolLM2-135M, whose head is tied, with an adapter on every linear layer; 90 tokens of English. About half a minute."""
    need_backend("torch"), need_backend("mlx")
    shapes = {name: entry.shape for name, entry in tensors.read_header(smollm2 / "model.safetensors").entries.items()}
    rng, arrays, targets = np.random.default_rng(0), {}, set()
    for name, shape in shapes.items():
        if name.endswith("_proj.weight"):
            path = f"base_model.model.{name.removesuffix('.weight')}"
            targets.add(name.split(".")[-2])
            arrays[f"{path}.lora_A.weight"] = (rng.normal(size=(8, shape[1])) / shape[1] ** 0.5).astype(np.float32)
            arrays[f"{path}.lora_B.weight"] = (rng.normal(size=(shape[0], 8)) / 40).astype(np.float32)
            if dora:
                arrays[f"{path}.lora_magnitude_vector"] = np.linalg.norm(tensors.read(smollm2 / "model.safetensors", [name])[name], axis=1) * 1.05
    source = tmp_path / "a"
    source.mkdir()
    tensors.write(source / "adapter_model.safetensors", arrays)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": sorted(targets), "use_dora": dora}
    (source / "adapter_config.json").write_text(json.dumps(config))
    done = upo(source, "--to", "mlx", "--out", tmp_path / "b", "--base", smollm2, "--verify", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    print(found["verdict"])
    assert found["modules"] == 210 and found["verdict"]["effect"] > 1 and found["verdict"]["adapted"] < 2e-3
    done = upo(tmp_path / "b", "--to", "peft", "--out", tmp_path / "c", "--base", smollm2, "--verify", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["verdict"]["adapted"] < 2e-3
    assert {n: t.raw.tobytes() for n, t in weights_of(tmp_path / "c").items()} == {n: a.tobytes() for n, a in arrays.items()}
