"""Adapter folders: what peft reads from us, what we read from peft, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from upo import tensors
from upo.adapters import lora_name, peft_config, read_adapter, write_adapter
from upo.errors import ModelError, RunError

TARGETS = tuple(f"model.layers.{i}.{m}" for i in range(2) for m in ("mlp.down_proj", "self_attn.q_proj"))


def make_arrays(
    targets: tuple[str, ...] = TARGETS, rank: int = 4, out: int = 6, into: int = 8, seed: int = 0
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {}
    for target in targets:
        arrays[lora_name(target, "A")] = rng.normal(size=(rank, into)).astype(np.float32)
        arrays[lora_name(target, "B")] = rng.normal(size=(out, rank)).astype(np.float32)
    return arrays


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "a", make_arrays(), peft_config("base", 4, 8.0, TARGETS, layers=2))
    return tmp_path / "a"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_round_trip(folder: Path) -> None:
    adapter = read_adapter(folder)
    assert (adapter.rank, adapter.alpha, adapter.scale, adapter.base_model) == (4, 8.0, 2.0, "base")
    assert adapter.targets == TARGETS
    for name, array in make_arrays().items():
        np.testing.assert_array_equal(adapter.arrays[name], array)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["a"]  # nothing temporary stays


def test_rslora_scale(folder: Path) -> None:
    edit(folder, use_rslora=True)
    assert read_adapter(folder).scale == 4.0  # 8 / sqrt(4)


def test_bf16_weights_come_as_float32(folder: Path) -> None:
    arrays = make_arrays()
    tensors.write(folder / "adapter_model.safetensors", arrays, dtypes=dict.fromkeys(arrays, "BF16"))
    adapter = read_adapter(folder)
    for name, array in arrays.items():
        assert adapter.arrays[name].dtype == np.float32
        np.testing.assert_allclose(adapter.arrays[name], array, rtol=2**-8)  # half a unit of 8 bits


def test_existing_folder_is_kept_unless_told(folder: Path) -> None:
    before = (folder / "adapter_model.safetensors").read_bytes()
    other = make_arrays(seed=1)
    with pytest.raises(RunError, match="exists already"):
        write_adapter(folder, other, peft_config("base", 4, 8.0, TARGETS))
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    with pytest.raises(ModelError, match="does not fit rank 8"):
        write_adapter(folder, other, peft_config("base", 8, 8.0, TARGETS), overwrite=True)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    write_adapter(folder, other, peft_config("base", 4, 8.0, TARGETS), overwrite=True)
    np.testing.assert_array_equal(read_adapter(folder).arrays[lora_name(TARGETS[0], "A")], other[lora_name(TARGETS[0], "A")])
    assert sorted(p.name for p in folder.parent.iterdir()) == ["a"]


def test_a_failed_overwrite_leaves_the_old_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "adapter_model.safetensors").read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("upo.adapters.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_adapter(folder, make_arrays(seed=1), peft_config("base", 4, 8.0, TARGETS), overwrite=True)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert sorted(p.name for p in folder.parent.iterdir()) == ["a"]


def test_a_failed_last_rename_brings_the_old_adapter_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "adapter_model.safetensors").read_bytes()
    rename = Path.rename

    def fail_for_the_new_one(path: Path, target: Path) -> Path:
        if ".new-" in path.name:
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(OSError, match="no"):
        write_adapter(folder, make_arrays(seed=1), peft_config("base", 4, 8.0, TARGETS), overwrite=True)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert sorted(p.name for p in folder.parent.iterdir()) == ["a"]


def test_target_names() -> None:
    assert peft_config("b", 4, 8.0, TARGETS, layers=2)["target_modules"] == ["down_proj", "q_proj"]
    full = sorted(TARGETS)
    assert peft_config("b", 4, 8.0, TARGETS)["target_modules"] == full  # the number of layers is not known
    assert peft_config("b", 4, 8.0, TARGETS, layers=3)["target_modules"] == full  # the third layer is not adapted
    assert peft_config("b", 4, 8.0, TARGETS[1:], layers=2)["target_modules"] == sorted(TARGETS[1:])
    assert peft_config("b", 4, 8.0, (*TARGETS, "lm_head"), layers=2)["target_modules"] == sorted((*TARGETS, "lm_head"))
    assert peft_config("b", 4, 8.0, TARGETS)["lora_alpha"] == 8 and type(peft_config("b", 4, 8.0, TARGETS)["lora_alpha"]) is int
    assert peft_config("b", 4, 2.5, TARGETS)["lora_alpha"] == 2.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is LOHA; only LORA"),
        ({"use_dora": True}, "use_dora = true.*DoRA"),
        ({"bias": "all"}, 'bias = "all"'),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save.*fully trained"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern.*ranks per module"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trained token embeddings"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base weights"),
        ({"r": 0}, "r must be a whole number"),
        ({"r": None}, "r must be a whole number"),
        ({"r": 8}, "does not fit rank 8"),
        ({"lora_alpha": "x"}, "lora_alpha must be a number"),
        ({"lora_alpha": True}, "lora_alpha must be a number"),
    ],
)
def test_what_cannot_be_applied_is_refused_by_name(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder, **changes)
    with pytest.raises(ModelError, match=message):
        read_adapter(folder)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_leave_the_base_alone_are_accepted(folder: Path, init: Any) -> None:
    edit(folder, init_lora_weights=init)
    assert read_adapter(folder).rank == 4


def test_weights_that_would_not_be_applied_are_refused(folder: Path) -> None:
    def weights(**changes: np.ndarray) -> None:
        arrays = make_arrays()
        for name, array in changes.items():
            arrays[name] = array
        tensors.write(folder / "adapter_model.safetensors", arrays)

    a = lora_name(TARGETS[0], "A")
    # Without `base_model.model.` peft loads nothing and says nothing.
    for name in (
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        f"{a.removesuffix('.weight')}.default.weight",
        "base_model.model.lm_head.base_layer.weight",
    ):
        weights(**{name: np.zeros((4, 8), np.float32)})
        with pytest.raises(ModelError, match=r"not a LoRA weight of the form.*Refused"):
            read_adapter(folder)
    weights(**{a: np.full((4, 8), np.nan, np.float32)})
    with pytest.raises(ModelError, match="NaN or infinity"):
        read_adapter(folder)
    weights(**{a: np.zeros(4, np.float32)})
    with pytest.raises(ModelError, match="does not fit rank 4"):
        read_adapter(folder)
    arrays = make_arrays()
    del arrays[a]
    tensors.write(folder / "adapter_model.safetensors", arrays)
    with pytest.raises(ModelError, match=f"{a}: missing"):
        read_adapter(folder)
    tensors.write(folder / "adapter_model.safetensors", {})
    with pytest.raises(ModelError, match="holds no LoRA weights"):
        read_adapter(folder)


def test_folders_of_other_kinds(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such adapter folder"):
        read_adapter(tmp_path / "none")
    with pytest.raises(ModelError, match=r"adapter_config\.json is missing"):
        read_adapter(tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "x")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: missing"):
        read_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"adapter_model\.bin: a pickle"):
        read_adapter(folder)
    mlx = tmp_path / "mlx"
    mlx.mkdir()
    (mlx / "adapter_config.json").write_text("{}")
    (mlx / "adapters.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="an mlx-lm adapter"):
        read_adapter(mlx)


def test_a_run_is_looked_into(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(ModelError, match="no finished adapter"):
        read_adapter(run)
    folder.rename(run / "adapter")
    assert read_adapter(run).rank == 4


def test_peft_loads_what_we_write_and_we_what_peft_writes(tiny_llama: Path, tmp_path: Path) -> None:
    torch, peft, transformers = pytest.importorskip("torch"), pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).float().eval()
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in base.named_modules()
        if name.startswith("model.layers") and hasattr(module, "in_features")
    }
    rng = np.random.default_rng(0)
    ids = torch.tensor(np.arange(12)[None] * 5 % 384)
    for case, targets in {
        "all": sorted(shapes),
        "some": [name for name in sorted(shapes) if "layers.1" in name or "q_proj" in name],
    }.items():
        arrays = {}
        for name in targets:
            out, into = shapes[name]
            arrays[lora_name(name, "A")] = (rng.normal(size=(4, into)) / 8).astype(np.float32)
            arrays[lora_name(name, "B")] = (rng.normal(size=(out, 4)) / 4).astype(np.float32)
        write_adapter(tmp_path / case, arrays, peft_config(str(tiny_llama), 4, 6.0, targets, layers=2))
        loaded = peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).float(), tmp_path / case
        ).eval()
        assert sum(isinstance(m, peft.tuners.lora.LoraLayer) for m in loaded.modules()) == len(targets)
        merged = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).float().eval()
        for name in targets:
            delta = 1.5 * arrays[lora_name(name, "B")].astype(np.float64) @ arrays[lora_name(name, "A")]
            merged.get_submodule(name).weight.data += torch.tensor(delta).float()
        with torch.no_grad():
            got, want, plain = (m(ids).logits.numpy() for m in (loaded, merged, base))
        np.testing.assert_allclose(got, want, atol=2e-5)  # float32 round-off: 4e-6 measured on a scale of 4
        assert np.abs(plain - want).max() > 0.1
        loaded.save_pretrained(tmp_path / f"{case}-by-peft")
        back = read_adapter(tmp_path / f"{case}-by-peft")
        assert back.targets == tuple(targets) and back.scale == 1.5
        for name, array in arrays.items():
            np.testing.assert_array_equal(back.arrays[name], array)
