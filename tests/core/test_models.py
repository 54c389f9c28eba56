"""Model folders: what is opened, what is refused, and what a configuration means."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from upo import models, tensors
from upo.errors import ModelError

CONFIG: dict[str, Any] = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "rope_theta": 10000.0}


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    write_json(path / "config.json", CONFIG)
    rng = np.random.default_rng(0)
    tensors.write(path / "model.safetensors", {f"layer{i}": rng.normal(size=(64, 64)).astype(np.float32) for i in range(3)})
    return path


def test_a_folder_resolves_to_itself(folder: Path) -> None:
    assert models.resolve(str(folder)) == folder
    assert models.weight_files(folder) == [folder / "model.safetensors"]


@pytest.mark.parametrize("name", ["./x", "/nowhere/x", "~/nowhere-at-all", "a/b/c", ""])
def test_a_path_that_is_not_there_says_so(name: str) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        models.resolve(name)


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        models.resolve(str(folder / "config.json"))


def test_hub_download_takes_no_code_and_no_pickles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **kwargs: asked.update(name=name, **kwargs) or str(folder)
    )
    assert models.resolve("owner/name", revision="abc") == folder
    assert asked["name"] == "owner/name" and asked["revision"] == "abc"
    kept = lambda: list(  # noqa: E731
        huggingface_hub.utils.filter_repo_objects(files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"])
    )
    files = [
        "config.json",
        "model-00001-of-2.safetensors",
        "modeling_x.py",
        "pytorch_model.bin",
        "x.pt",
        "x.pth",
        "consolidated.00.safetensors",
        "chat_template.jinja",
        "merges.txt",
    ]
    assert kept() == ["config.json", "model-00001-of-2.safetensors", "chat_template.jinja", "merges.txt"]
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ModelError, match=r"no \.safetensors weights"):
        models.resolve("owner/name")
    assert models.resolve("owner/name", weights=False) == models.resolve(str(folder), weights=False) == folder
    assert kept() == ["config.json", "chat_template.jinja", "merges.txt"]


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({}, ""),
        ({"quantization_config": None}, ""),
        ({"quantization": {"bits": 4}}, ""),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"text_config": {"quantization_config": {"quant_method": "mxfp4"}}}, "mxfp4"),
        ({"quantization_config": {"bits": 4}}, "an unknown method"),
    ],
)
def test_what_quantised_a_model(config: dict[str, Any], method: str) -> None:
    assert models.quantised_by(config) == method


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "gated .*hf auth login"),
        ("RepositoryNotFoundError", "neither a folder here nor a public model"),
        ("RevisionNotFoundError", "has no revision main2"),
        ("LocalEntryNotFoundError", "hub cannot be reached"),
        ("OfflineModeIsEnabled", "HF_HUB_OFFLINE"),
        ("HFValidationError", "nor a valid hub id"),
    ],
)
def test_hub_trouble_is_one_line_with_a_remedy(error: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def fail(*_: Any, **__: Any) -> str:
        kind = getattr(errors, error)
        made = kind.__new__(kind)  # their constructors want a response object
        Exception.__init__(made, "first line\nsecond line")
        raise made

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=message) as caught:
        models.resolve("owner/name", revision="main2")
    assert "\n" not in str(caught.value) and "owner/name" in str(caught.value)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: missing"):
        models.resolve(str(tmp_path))


@pytest.mark.parametrize("text", ["{broken", "[]", '"x"', "[" * 100_000])
def test_a_broken_config_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        models.resolve(str(folder))


@pytest.mark.parametrize(
    ("file", "key"), [("config.json", "auto_map"), ("config.json", "model_file"), ("tokenizer_config.json", "auto_map")]
)
def test_remote_code_is_refused(folder: Path, file: str, key: str) -> None:
    write_json(folder / file, {**CONFIG, "model_type": "own", "tokenizer_class": "Own", key: {"AutoModel": "modeling.Model"}})
    with pytest.raises(ModelError, match=rf"{file}.*code of its own \(`{key}`\)"):
        models.resolve(str(folder))


def test_code_that_nothing_needs_is_left_alone_and_told(folder: Path) -> None:
    write_json(folder / "config.json", {**CONFIG, "auto_map": {"AutoModelForCausalLM": "modeling.Model"}})
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": ["x.Y", None]}})
    assert models.resolve(str(folder)) == folder
    config, notes = models.model_config(folder)
    assert "auto_map" not in config
    assert [n for n in notes if "auto_map" in n] == [
        "config.json and tokenizer_config.json: code of the model's own (auto_map) is not run, as there is an implementation of llama without it."
    ]
    write_json(folder / "config.json", {**CONFIG, "model_file": "model.py"})  # mlx-lm would run that one
    with pytest.raises(ModelError, match=r"config\.json: asks for code of its own \(`model_file`\)"):
        models.resolve(str(folder))


def test_a_config_that_names_no_kind_of_model(folder: Path) -> None:
    write_json(folder / "config.json", {key: value for key, value in CONFIG.items() if key != "model_type"})
    with pytest.raises(ModelError, match=r"config\.json: has no `model_type`"):
        models.resolve(str(folder))


def test_weights_that_were_cut_short(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"model\.safetensors: holds .* cut short or damaged"):
        models.resolve(str(folder))


def test_pickles_only_and_nothing_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \.safetensors weights"):
        models.check_folder(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"only pickle weights \(pytorch_model\.bin\)"):
        models.check_folder(folder)


def index(folder: Path, *names: str) -> None:
    write_json(folder / "model.safetensors.index.json", {"weight_map": {f"w{i}": name for i, name in enumerate(names)}})


def test_index(folder: Path) -> None:
    index(folder, "model.safetensors", "model.safetensors")
    assert models.weight_files(folder) == [folder / "model.safetensors"]
    index(folder, "model.safetensors", "model-2.safetensors")
    with pytest.raises(ModelError, match=r"model-2\.safetensors: missing.*incomplete"):
        models.check_folder(folder)


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/other.safetensors", "a/../../other.safetensors", "model.bin", "..\\other.safetensors"]
)
def test_an_index_that_leaves_the_folder_is_refused(folder: Path, name: str) -> None:
    (folder.parent / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    index(folder, name)
    with pytest.raises(ModelError, match=r"not a .safetensors file inside the folder"):
        models.check_folder(folder)


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}])
def test_an_unusable_index_is_refused(folder: Path, content: Any) -> None:
    write_json(folder / "model.safetensors.index.json", content)
    with pytest.raises(ModelError, match="no usable `weight_map`"):
        models.check_folder(folder)


def test_links_out_of_the_folder_are_refused(folder: Path) -> None:
    outside = folder.parent / "elsewhere"
    outside.mkdir()
    (folder / "model.safetensors").rename(outside / "w")
    (folder / "model.safetensors").symlink_to(outside / "w")
    with pytest.raises(ModelError, match="leads out of the model's folder"):
        models.check_folder(folder)
    (folder / "model.safetensors").unlink()
    (outside / "w").rename(outside / "w.safetensors")
    (folder / "sub").symlink_to(outside)
    index(folder, "sub/w.safetensors")
    with pytest.raises(ModelError, match="leads out"):
        models.weight_files(folder)


@pytest.mark.parametrize("shared", [False, True])
def test_the_hub_caches_own_links_are_allowed(folder: Path, tmp_path: Path, shared: bool) -> None:
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    store = tmp_path / "hub" / "blobs"
    store.mkdir()
    for name in ("config.json", "model.safetensors"):
        blob = repository / "blobs" / name
        (folder / name).rename(store / name if shared else blob)
        if shared:
            blob.symlink_to(os.path.relpath(store / name, blob.parent))
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert models.resolve(str(snapshot)) == snapshot
    (snapshot / "x.json").symlink_to(tmp_path / "model")
    with pytest.raises(ModelError, match="leads out"):
        models.check_folder(snapshot)


def test_weights_hash_sees_every_layer_and_the_architecture(folder: Path) -> None:
    first = models.weights_hash(folder)
    assert len(first) == 16 and models.weights_hash(folder) == first
    write_json(folder / "config.json", {**CONFIG, "transformers_version": "9", "_name_or_path": "x", "dtype": "float16"})
    assert models.weights_hash(folder) == first
    write_json(folder / "config.json", {**CONFIG, "rope_theta": 20000.0})
    assert models.weights_hash(folder) != first
    write_json(folder / "config.json", CONFIG)
    arrays = tensors.read(folder / "model.safetensors")
    tensors.write(
        folder / "model.safetensors", {**arrays, "layer1": arrays["layer1"] * 1.01}
    )  # a merge that spares the first and last tensor
    assert models.weights_hash(folder) != first
    tensors.write(folder / "model.safetensors", arrays)
    assert models.weights_hash(folder) == first


def test_quantized_mlx() -> None:
    assert models.is_quantized_mlx({"quantization": {"group_size": 64, "bits": 4}})
    assert not models.is_quantized_mlx({"quantization_config": {"quant_method": "bitsandbytes"}})
