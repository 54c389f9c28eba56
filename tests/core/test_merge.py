"""Merging without a framework: the numbers, what travels along, and what is refused with nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from upo import tensors
from upo.adapters import lora_name, peft_config, write_adapter
from upo.convert import merge_folder, merge_source
from upo.convert.merge import merge
from upo.convert.merge_patch import Patch
from upo.convert.merge_source import Source, dequantised
from upo.errors import ModelError, RunError, UpoError
from upo.models import weights_hash

PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
SHAPES = {PATHS[0]: (64, 64), PATHS[1]: (64, 128)}


def make_adapter(folder: Path, base: Path, size: float = 0.1, rank: int = 4, alpha: float = 8.0) -> dict[str, np.ndarray]:
    """A PEFT adapter; returns its change of each weight."""
    rng = np.random.default_rng(1)
    arrays, change = {}, {}
    for path, (out, into) in SHAPES.items():
        a, b = (rng.normal(0, size, shape).astype(np.float32) for shape in ((rank, into), (out, rank)))
        arrays |= {lora_name(path, "A"): a, lora_name(path, "B"): b}
        change[f"{path}.weight"] = alpha / rank * b.astype(np.float64) @ a
    write_adapter(folder, arrays, peft_config(str(base), rank, alpha, PATHS))
    return change


def edit_json(path: Path, **changes: Any) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def listing(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def base(make_tiny_llama) -> Path:
    return make_tiny_llama()


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    make_adapter(tmp_path / "adapter", base)
    return tmp_path / "adapter"


def test_the_sum_in_float32_and_everything_else_bit_for_bit(tmp_path: Path, base: Path) -> None:
    change = make_adapter(tmp_path / "adapter", base)
    before = tensors.read(base / "model.safetensors")
    result = merge(tmp_path / "adapter", tmp_path / "out")
    after = tensors.read(tmp_path / "out" / "model.safetensors")
    assert after.keys() == before.keys() and (result.modules, result.dtype, result.layout) == (2, "float32", "hf")
    for name, array in before.items():
        if name in change:
            np.testing.assert_allclose(after[name], array + change[name], atol=3e-7, rtol=0)  # float32 at values of 1
            assert np.abs(after[name] - array).max() > 0.05
        else:
            np.testing.assert_array_equal(after[name], array)
    assert result.rounding == 0.0 and result.size == (tmp_path / "out" / "model.safetensors").stat().st_size


@pytest.mark.parametrize(("stored", "name"), [("BF16", "bfloat16"), ("F16", "float16")])
def test_one_rounding_to_the_dtype_of_the_base(tmp_path: Path, base: Path, stored: str, name: str) -> None:
    arrays = tensors.read(base / "model.safetensors")
    tensors.write(base / "model.safetensors", arrays, dtypes=dict.fromkeys(arrays, stored))
    rounded = tensors.read(base / "model.safetensors")
    change = make_adapter(tmp_path / "adapter", base)
    result = merge(tmp_path / "adapter", tmp_path / "out")
    assert {e.dtype for e in tensors.read_header(tmp_path / "out" / "model.safetensors").entries.values()} == {stored}
    after = tensors.read(tmp_path / "out" / "model.safetensors")
    bits = {"BF16": 8, "F16": 11}[stored]
    for path, delta in change.items():
        exact = rounded[path] + delta
        # half a unit in the last place, and a little for the float32 sum where it decides a tie
        assert np.all(np.abs(after[path] - exact) <= 2.0**-bits * np.maximum(np.abs(exact), 2.0**-14) * 1.001), path
    error = sum(float(np.square(after[p] - rounded[p] - delta).sum()) for p, delta in change.items())
    size = sum(float(np.square(delta).sum()) for delta in change.values())
    assert result.rounding == pytest.approx((error / size) ** 0.5, rel=1e-3) and result.dtype == name and result.warnings == ()


def test_a_change_lost_in_rounding_is_told(tmp_path: Path, base: Path) -> None:
    arrays = tensors.read(base / "model.safetensors")
    tensors.write(base / "model.safetensors", arrays, dtypes=dict.fromkeys(arrays, "BF16"))
    make_adapter(tmp_path / "adapter", base, size=0.003)
    result = merge(tmp_path / "adapter", tmp_path / "out")
    assert result.rounding > 0.5 and "rounding to bfloat16 takes" in result.warnings[0]


def test_pieces_of_any_size_give_the_same_file(tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(adapter, tmp_path / "whole")
    monkeypatch.setattr(merge_source, "PIECE", 300)  # a few rows, and rows that do not divide the weights evenly
    merge(adapter, tmp_path / "pieces")
    whole, pieces = (tensors.read(tmp_path / f / "model.safetensors") for f in ("whole", "pieces"))
    for name, array in whole.items():
        np.testing.assert_allclose(pieces[name], array, atol=1e-6, err_msg=name)  # a product of fewer rows may sum in another order


def test_shards_and_their_index(tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(adapter, tmp_path / "one")
    monkeypatch.setattr(merge_folder, "SHARD", 100_000)
    merge(adapter, tmp_path / "many")
    files = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    found = {name: tensors.read(tmp_path / "many" / file, [name])[name] for name, file in index["weight_map"].items()}
    for name, array in tensors.read(tmp_path / "one" / "model.safetensors").items():
        np.testing.assert_array_equal(found[name], array)
    merge(adapter, tmp_path / "again", str(tmp_path / "many"))  # read from shards, too
    assert set(Source(tmp_path / "again", {}).weights) == set(found)


def test_what_travels_along(tmp_path: Path, base: Path, adapter: Path) -> None:
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("tool")
    (base / "LICENSE").write_text("free")
    (base / "pytorch_model.bin").write_bytes(b"no")
    (base / "run.py").write_text("no")
    before = listing(base)
    merge(adapter, tmp_path / "out")
    after = listing(tmp_path / "out")
    carried = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "additional_chat_templates/tool.jinja", "LICENSE"}
    assert set(after) == carried | {"config.json", "model.safetensors"}
    for name in carried:
        assert after[name] == before[name]
    config = json.loads(after["config.json"])
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100000.0 and config["tie_word_embeddings"] is False
    assert listing(base) == before, "the base was touched"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "out"]


def test_a_config_of_transformers_5_gets_both_spellings(tmp_path: Path, base: Path, adapter: Path) -> None:
    edit_json(base / "config.json", rope_theta=..., _name_or_path="elsewhere")
    result = merge(adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 100000.0 and "_name_or_path" not in config and any("rope_theta" in note for note in result.notes)


def test_dora_and_experts_of_a_patch() -> None:
    rng = np.random.default_rng(0)
    a, b, w = rng.normal(size=(3, 2, 5)), rng.normal(size=(3, 4, 2)), rng.normal(size=(12, 5))
    patch = Patch("x", a, b, 0.5)
    want = w.reshape(3, 4, 5) + 0.5 * np.einsum("eor,eri->eoi", b, a)
    for first, last in ((0, 12), (2, 3), (3, 9), (8, 12)):  # within an expert, across two, across all
        np.testing.assert_allclose(patch.applied(first, w[first:last]), want.reshape(12, 5)[first:last], atol=1e-12)
    magnitude = rng.uniform(1, 2, 4)
    one = Patch("x", a[:1], b[:1], 0.5, magnitude).applied(1, w[1:3])
    np.testing.assert_allclose(one, (want[0] * (magnitude / np.linalg.norm(want[0], axis=1))[:, None])[1:3], atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(one, axis=1), magnitude[1:3], atol=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_stream_of_bits_is_unpacked(bits: int) -> None:
    """Against Python's integers: the first value in the lowest bits, 32 values in `bits` words."""
    rng = np.random.default_rng(bits)
    levels = rng.integers(0, 2**bits, (3, 64))
    words = np.zeros((3, 2 * bits), np.uint32)
    for row in range(3):
        stream = sum(int(level) << (bits * i) for i, level in enumerate(levels[row]))
        words[row] = [stream >> (32 * i) & 0xFFFFFFFF for i in range(2 * bits)]
    scales, biases = (rng.normal(size=(3, 2)).astype(np.float32) for _ in range(2))
    want = levels.reshape(3, 2, 32) * scales[..., None].astype(np.float64) + biases[..., None]
    np.testing.assert_allclose(dequantised(words, scales, biases, bits), want.reshape(3, 64), rtol=1e-5, atol=1e-5)


# --- Refused: one line, the source untouched, nothing left behind -----------------------------------------------------------------


def refused(adapter: Path, source: Path, out: Path, error: type[UpoError], message: str, **options: Any) -> None:
    before, beside = listing(source), sorted(out.parent.iterdir()) if out.parent.is_dir() else []
    with pytest.raises(error, match=message) as caught:
        merge(adapter, out, **options)
    assert "\n" not in str(caught.value)
    assert listing(source) == before
    assert (sorted(out.parent.iterdir()) if out.parent.is_dir() else []) == beside


def test_targets_that_are_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("there", "link"):
        refused(adapter, base, tmp_path / name, RunError, "exists already")
    refused(adapter, base, tmp_path / "no" / "out", RunError, "there is no folder")
    refused(adapter, base, base / "out", RunError, "lies inside")
    refused(adapter, base, adapter / "out", RunError, "lies inside")
    refused(adapter, base, tmp_path / "out", UpoError, "--to gguf: unknown layout", to="gguf")
    refused(adapter, base, tmp_path / "out", UpoError, "--bits 3", to="mlx", bits=3)
    refused(adapter, base, tmp_path / "out", UpoError, "with --to mlx only", bits=4)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_target_without_permission(tmp_path: Path, base: Path, adapter: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(adapter, base, tmp_path / "locked" / "out", RunError, "cannot be written to")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("where", ["weights", "config", "rest"])
def test_a_disk_that_fails(tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, code: int, where: str) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    target = {"weights": (tensors.os, "fsync"), "config": (merge_folder, "write_json"), "rest": (shutil, "copyfile")}[where]
    monkeypatch.setattr(*target, fail)
    refused(adapter, base, tmp_path / "out", RunError, f"out: cannot be written .{os.strerror(code)}")


def test_a_target_that_appears_meanwhile_is_left_alone(tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def appear(source: Path, folder: Path) -> list[str]:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")
        return []

    monkeypatch.setattr(merge_folder, "copy_rest", appear)
    with pytest.raises(RunError, match="exists already"):
        merge(adapter, tmp_path / "out")
    assert listing(tmp_path / "out") == {"mine": b"mine"} and sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "out"]


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    refused(adapter, base, tmp_path / "out", RunError, "GB are free")


def test_another_base(tmp_path: Path, base: Path, adapter: Path) -> None:
    path = base / "model.safetensors"
    arrays = tensors.read(path)
    tensors.write(path, {n: a for n, a in arrays.items() if n != f"{PATHS[0]}.weight"})
    refused(adapter, base, tmp_path / "out", ModelError, f"has no weight {PATHS[0]}.weight")
    tensors.write(path, {**arrays, f"{PATHS[0]}.weight": np.zeros((32, 64), np.float32)})
    refused(adapter, base, tmp_path / "out", ModelError, r"q_proj is \[32, 64\]; the adapter is for \[64, 64\]|q_proj.weight is \[32, 64\]")
    tensors.write(path, {**arrays, f"{PATHS[0]}.weight": np.zeros((64, 64), np.int8)})
    refused(adapter, base, tmp_path / "out", ModelError, "stored as I8")
    tensors.write(path, {**arrays, f"{PATHS[0]}.weight": np.full((64, 64), 6e4, np.float16)})
    change = make_adapter(tmp_path / "large", base, size=100.0)
    assert change[f"{PATHS[0]}.weight"].max() > 6e4
    refused(tmp_path / "large", base, tmp_path / "out", ModelError, "too large for F16")


def test_a_run_knows_its_base_by_hash(tmp_path: Path, base: Path, make_tiny_llama) -> None:
    run = tmp_path / "run"
    make_adapter(run / "adapter", base)
    (run / "manifest.json").write_text(json.dumps({"identity": {"model": weights_hash(base)}}))
    assert merge(run, tmp_path / "out").base == base
    other = make_tiny_llama(seed=5)
    refused(run, other, tmp_path / "two", ModelError, "is another model than the one", base=str(other))


def test_no_base_named(tmp_path: Path, base: Path, adapter: Path) -> None:
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    refused(adapter, base, tmp_path / "out", ModelError, "names no base model.*--base MODEL")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="./gone")
    refused(adapter, base, tmp_path / "out", ModelError, "no such folder.*--base MODEL")
    assert merge(adapter, tmp_path / "out", str(base)).modules == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantised with bitsandbytes.*original model"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised with gptq"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "quantised with fp8"),
        ({"model_type": "gpt2"}, "model_type gpt2: .*merge_and_unload"),
        ({"model_type": "own", "auto_map": {"AutoModel": "x.Y"}}, "code of its own"),
    ],
)
def test_bases_that_cannot_be_added_to(tmp_path: Path, base: Path, adapter: Path, changes: dict[str, Any], message: str) -> None:
    edit_json(base / "config.json", **changes)
    refused(adapter, base, tmp_path / "out", ModelError, message)


def test_a_base_of_modelopt(tmp_path: Path, base: Path, adapter: Path) -> None:
    (base / "hf_quant_config.json").write_text("{}")
    refused(adapter, base, tmp_path / "out", ModelError, "quantised with ModelOpt")


def test_a_chat_template_of_the_adapters_own_is_told(tmp_path: Path, base: Path, adapter: Path) -> None:
    shutil.copyfile(base / "tokenizer.json", adapter / "tokenizer.json")
    assert merge(adapter, tmp_path / "one").warnings == ()
    (adapter / "chat_template.jinja").write_text("another")
    assert "chat_template.jinja: differs from the base's" in merge(adapter, tmp_path / "two").warnings[0]
    assert not (tmp_path / "two" / "chat_template.jinja").exists()


@pytest.mark.parametrize("kind", ["olmo", "ernie4_5_moe", "gpt_oss", "nanochat"])
def test_families_that_do_not_reach_mlx_are_refused_by_name(tmp_path: Path, base: Path, adapter: Path, kind: str) -> None:
    edit_json(base / "config.json", model_type=kind)
    refused(adapter, base, tmp_path / "out", ModelError, f"model_type {kind}: .*--to hf", to="mlx")
    assert any(f"model_type {kind}: for transformers only" in note for note in merge(adapter, tmp_path / "out").notes)


def test_weights_in_two_places(tmp_path: Path, base: Path, adapter: Path) -> None:
    shutil.copyfile(base / "model.safetensors", base / "more.safetensors")
    refused(adapter, base, tmp_path / "out", ModelError, "is in model.safetensors too")
    index = {"weight_map": {"model.norm.weight": "more.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(adapter, base, tmp_path / "out", ModelError, "beside model.safetensors.index.json, which does not name it")


def test_paths_that_leave_the_base(tmp_path: Path, base: Path, adapter: Path) -> None:
    outside = tmp_path / "secret.jinja"
    outside.write_text("secret")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "x.jinja").symlink_to(outside)
    refused(adapter, base, tmp_path / "out", ModelError, "leads out of the model's folder")
    shutil.rmtree(base / "additional_chat_templates")
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "x.jinja").write_text("secret")
    (base / "additional_chat_templates").symlink_to(tmp_path / "templates")
    refused(adapter, base, tmp_path / "out", ModelError, "leads out of the model's folder")
    (base / "additional_chat_templates").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../adapter/adapter_model.safetensors"}}))
    refused(adapter, base, tmp_path / "out", ModelError, "not a .safetensors file inside the folder")


def test_a_damaged_base_or_adapter(tmp_path: Path, base: Path, adapter: Path) -> None:
    for path in (base / "model.safetensors", adapter / "adapter_model.safetensors"):
        whole = path.read_bytes()
        path.write_bytes(whole[:-8])
        refused(adapter, base, tmp_path / "out", ModelError, "cut short")
        path.write_bytes(whole)


# --- Bases quantised by MLX -------------------------------------------------------------------------------------------------------


def quantise(base: Path, name: str, bits: int = 4, group: int = 64) -> np.ndarray:
    """Pack one weight as mlx would, dtype of scales float16; returns what it stands for."""
    arrays = tensors.read(base / "model.safetensors")
    levels = np.random.default_rng(0).integers(0, 2**bits, arrays[f"{name}.weight"].shape, np.uint32)
    out, into = levels.shape
    per = 32 // bits
    packed = (levels.reshape(out, -1, per) << (np.arange(per, dtype=np.uint32) * bits)).sum(axis=2, dtype=np.uint32)
    scales, biases = (np.full((out, into // group), value, np.float16) for value in (0.125, -1.0))
    tensors.write(base / "model.safetensors", {**arrays, f"{name}.weight": packed, f"{name}.scales": scales, f"{name}.biases": biases}, {"format": "mlx"})
    edit_json(base / "config.json", quantization={"group_size": group, "bits": bits}, quantization_config={"group_size": group, "bits": bits})
    return levels * 0.125 - 1.0


def test_a_quantised_base_is_unpacked_and_warned_about(tmp_path: Path, base: Path) -> None:
    change = make_adapter(tmp_path / "adapter", base)
    want = quantise(base, PATHS[0])
    result = merge(tmp_path / "adapter", tmp_path / "out")
    after = tensors.read(tmp_path / "out" / "model.safetensors")
    np.testing.assert_allclose(after[f"{PATHS[0]}.weight"], want + change[f"{PATHS[0]}.weight"], atol=2e-3)  # float16 at 2
    assert not any(name.endswith((".scales", ".biases")) for name in after)
    assert "the base is quantised" in result.warnings[0] and "--base MODEL" in result.warnings[0]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization" not in config and "quantization_config" not in config
    assert tensors.read_header(tmp_path / "out" / "model.safetensors").metadata == {"format": "pt"}


def test_quantisations_that_cannot_be_undone(tmp_path: Path, base: Path, adapter: Path) -> None:
    quantise(base, PATHS[0])
    edit_json(base / "config.json", quantization={"group_size": 32, "bits": 4, "mode": "mxfp4"})
    refused(adapter, base, tmp_path / "out", ModelError, "mode mxfp4.*--dequantize")
    edit_json(base / "config.json", quantization={"group_size": 32, "bits": 4})
    refused(adapter, base, tmp_path / "out", ModelError, "not what 4 bits in groups of 32 make")
    edit_json(base / "config.json", quantization={"group_size": 64, "bits": 4}, model_type="qwen3_moe")
    refused(adapter, base, tmp_path / "out", ModelError, "model_type qwen3_moe: .*mlx-lm, whose layout this base has")
