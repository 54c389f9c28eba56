"""Adapters from one format to another, with NumPy alone: what moves, what stays bit for bit, what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_cases import PREFIX, TARGETS, config_of, draw, edit, mlx_folder, peft_folder, same_bits, save, snapshot, weights_of

from upo import adapters, tensors
from upo.convert.adapter import Tensor, from_values
from upo.convert.run import convert
from upo.errors import ModelError, RunError, UpoError

RNG = np.random.default_rng(7)


def experts_base(folder: Path, kind: str = "qwen3_moe", experts: int = 4, hidden: int = 16) -> Path:
    """A model folder as far as a conversion looks into it."""
    folder.mkdir()
    config = {"model_type": kind, "num_experts": experts, "num_hidden_layers": 2, "hidden_size": hidden, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    tensors.write(folder / "model.safetensors", {"lm_head.weight": np.zeros((8, hidden), np.float32)})
    return folder


# --- What moves ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("dora", [False, True])
def test_there_and_back_is_bitwise(tmp_path: Path, dtype: str, dora: bool) -> None:
    source = peft_folder(tmp_path / "a", dtype=dtype, dora=dora)
    there = convert(source, "mlx", tmp_path / "b")
    back = convert(tmp_path / "b", "peft", tmp_path / "c")
    assert same_bits(source, tmp_path / "c")
    assert there.dtypes == back.dtypes == (dtype,) and there.modules == len(TARGETS) and there.rank == 4
    assert there.difference < 1e-12 and back.difference < 1e-12
    config = config_of(tmp_path / "c")
    assert (config["r"], config["lora_alpha"], config["use_dora"], config["use_rslora"]) == (4, 8, dora, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    there = weights_of(tmp_path / "b")
    a = weights_of(source)[f"{PREFIX}{TARGETS[0]}.lora_A.weight"]
    assert there[f"{TARGETS[0]}.lora_a"].same(a.moved(np.transpose))
    assert config_of(tmp_path / "b")["fine_tune_type"] == ("dora" if dora else "lora")


def test_mlx_there_and_back_is_bitwise(tmp_path: Path) -> None:
    source = mlx_folder(tmp_path / "a", dtype="BF16")
    convert(source, "peft", tmp_path / "b")
    convert(tmp_path / "b", "mlx", tmp_path / "c")
    assert same_bits(source, tmp_path / "c")
    assert config_of(tmp_path / "b")["lora_alpha"] == 80  # scale * rank: "alpha = scale" is the usual mistake
    assert config_of(tmp_path / "c")["lora_parameters"]["scale"] == 20.0


def test_different_ranks_and_scales(tmp_path: Path) -> None:
    ranks = {TARGETS[0]: 8, TARGETS[5]: 2}
    pattern = {"rank_pattern": {TARGETS[0]: 8, r".*1\.self_attn\.k_proj": 2}, "alpha_pattern": {TARGETS[2]: 16, TARGETS[3]: 5}}
    source = peft_folder(tmp_path / "a", ranks=ranks, dtype="BF16", **pattern)
    result = convert(source, "mlx", tmp_path / "b")
    assert config_of(tmp_path / "b")["lora_parameters"]["rank"] == 8 and config_of(tmp_path / "b")["lora_parameters"]["scale"] == 2.0
    b = weights_of(tmp_path / "b")
    assert (b[f"{TARGETS[5]}.lora_a"].raw[:, 2:] == 0).all() and (b[f"{TARGETS[5]}.lora_b"].raw[2:] == 0).all()
    # Factors of two keep bfloat16, others need float32.
    assert b[f"{TARGETS[2]}.lora_b"].dtype == "BF16" and b[f"{TARGETS[3]}.lora_b"].dtype == "F32"
    own = weights_of(source)
    for index, factor in ((2, 2.0), (3, 0.625), (0, 0.5)):
        want = own[f"{PREFIX}{TARGETS[index]}.lora_B.weight"].values() * factor
        np.testing.assert_allclose(b[f"{TARGETS[index]}.lora_b"].values()[: want.shape[1]], want.T, rtol=0 if index != 3 else 1e-7)
    assert any("7 of 8 modules have a rank below 8" in note for note in result.notes)
    assert any("4 of 8 modules have another scale than 2" in note and "1 by no power of two" in note for note in result.notes)
    convert(tmp_path / "b", "peft", tmp_path / "c")
    c = weights_of(tmp_path / "c")
    assert c[f"{PREFIX}{TARGETS[5]}.lora_A.weight"].same(own[f"{PREFIX}{TARGETS[5]}.lora_A.weight"])  # the padding is gone
    assert set(config_of(tmp_path / "c")["rank_pattern"].values()) == {8, 2}


def test_rslora_becomes_a_plain_alpha(tmp_path: Path) -> None:
    source = peft_folder(tmp_path / "a", use_rslora=True)
    convert(source, "mlx", tmp_path / "b")
    assert config_of(tmp_path / "b")["lora_parameters"]["scale"] == 4.0  # 8 / sqrt(4)
    convert(source, "peft", tmp_path / "c")
    assert config_of(tmp_path / "c")["lora_alpha"] == 16 and config_of(tmp_path / "c")["use_rslora"] is False


def test_alpha_stays_a_whole_number_where_it_was_one(tmp_path: Path) -> None:
    source = peft_folder(tmp_path / "a", lora_alpha=7)
    convert(source, "mlx", tmp_path / "b")
    convert(tmp_path / "b", "peft", tmp_path / "c")
    assert config_of(tmp_path / "c")["lora_alpha"] == 7 and type(config_of(tmp_path / "c")["lora_alpha"]) is int
    convert(mlx_folder(tmp_path / "d", scale=0.3), "peft", tmp_path / "e")
    assert config_of(tmp_path / "e")["lora_alpha"] == 1.2


def test_keys_are_relative_only_for_the_last_blocks_alike(tmp_path: Path, tiny_llama: Path) -> None:
    def keys(name: str, paths: list[str], base: str | None) -> tuple[list[str], int]:
        convert(peft_folder(tmp_path / name, paths), "mlx", tmp_path / f"{name}-m", base)
        config = config_of(tmp_path / f"{name}-m")
        return config["lora_parameters"]["keys"], config["num_layers"]

    every = sorted(t.split(".", 3)[3] for t in TARGETS[:4])
    assert keys("all", TARGETS, str(tiny_llama)) == (every, 2)
    assert keys("unknown", TARGETS, None) == (sorted(TARGETS), -1)
    assert keys("last", TARGETS[4:], str(tiny_llama)) == (every, 1)
    assert keys("first", TARGETS[:4], str(tiny_llama)) == (sorted(TARGETS[:4]), -1)
    assert keys("uneven", TARGETS[1:], str(tiny_llama)) == (sorted(TARGETS[1:]), -1)
    assert keys("head", [*TARGETS, "lm_head"], str(tiny_llama)) == ([*every, "lm_head"], 2)


def test_a_tied_embedding_is_one_adapter_in_mlx_and_two_names_in_peft(tmp_path: Path, tiny_llama_tied: Path, tiny_llama: Path) -> None:
    source = mlx_folder(tmp_path / "a", ["model.embed_tokens", TARGETS[0]])
    a = weights_of(source)
    assert a["model.embed_tokens.lora_a"].shape == (384, 4)
    convert(source, "peft", tmp_path / "b", str(tiny_llama_tied))
    b = weights_of(tmp_path / "b")
    assert config_of(tmp_path / "b")["ensure_weight_tying"] is True
    assert b[f"{PREFIX}lm_head.lora_A.weight"].same(a["model.embed_tokens.lora_b"])
    assert b[f"{PREFIX}lm_head.lora_B.weight"].same(a["model.embed_tokens.lora_a"])
    convert(tmp_path / "b", "mlx", tmp_path / "c", str(tiny_llama_tied))
    assert same_bits(source, tmp_path / "c")
    convert(source, "peft", tmp_path / "d", str(tiny_llama))  # a head of its own: the embedding alone
    assert f"{PREFIX}lm_head.lora_A.weight" not in weights_of(tmp_path / "d")


def test_dtype_rounds_when_asked(tmp_path: Path) -> None:
    source = peft_folder(tmp_path / "a")
    result = convert(source, "mlx", tmp_path / "b", dtype="bfloat16")
    assert result.dtypes == ("BF16",) and 1e-4 < result.difference < 1e-2
    a = weights_of(source)[f"{PREFIX}{TARGETS[0]}.lora_A.weight"]
    assert weights_of(tmp_path / "b")[f"{TARGETS[0]}.lora_a"].same(a.moved(np.transpose).cast("BF16"))
    assert convert(source, "mlx", tmp_path / "c", dtype="float16").difference < 2e-3
    wide = peft_folder(tmp_path / "d", dtype="F64")
    with pytest.raises(ModelError, match=r"is float64.*--dtype float32"):
        convert(wide, "mlx", tmp_path / "e")
    assert convert(wide, "mlx", tmp_path / "e", dtype="float32").dtypes == ("F32",)


def test_numbers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source = peft_folder(tmp_path / "a")
    arrays = weights_of(source)
    arrays[f"{PREFIX}{TARGETS[0]}.lora_B.weight"].raw[0, 0] = 1e5
    shutil.rmtree(source)
    save(source, "adapter_model.safetensors", arrays, {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": sorted({t.split(".")[-1] for t in TARGETS})})
    with pytest.raises(ModelError, match="too large for F16"):
        convert(source, "mlx", tmp_path / "b", dtype="float16")
    assert not (tmp_path / "b").exists()


def test_what_a_run_can_start_from(tmp_path: Path) -> None:
    source = peft_folder(tmp_path / "a", ranks={TARGETS[0]: 8}, rank_pattern={TARGETS[0]: 8}, lora_dropout=0.1)
    with pytest.raises(ModelError, match="ranks per module"):
        adapters.read_adapter(source)  # as it is, the trainer refuses it
    result = convert(source, "upo", tmp_path / "b")
    found = adapters.read_adapter(tmp_path / "b")
    assert (found.rank, found.scale, found.targets) == (8, 2.0, tuple(sorted(TARGETS)))
    assert any("dropout 0.1 became 0" in note for note in result.notes)
    convert(mlx_folder(tmp_path / "m"), "upo", tmp_path / "c")
    assert adapters.read_adapter(tmp_path / "c").scale == 20.0
    with pytest.raises(ModelError, match="DoRA is nothing upo trains on"):
        convert(peft_folder(tmp_path / "d", dora=True), "upo", tmp_path / "e")


def test_a_run_and_its_checkpoints(tmp_path: Path) -> None:
    from upo.training.checkpoint import write_checkpoint

    run = tmp_path / "run"
    source = peft_folder(run / "adapter")
    assert convert(run, "mlx", tmp_path / "a").source == source
    state = {"adapter": {n: t.raw for n, t in weights_of(source).items()}, "optimizer": {"step": np.ones(1, np.float32)}}
    config = adapters.peft_config("m", 4, 8.0, TARGETS)
    checkpoint = run / "checkpoints" / "step-000003"
    (run / "checkpoints").mkdir()
    write_checkpoint(checkpoint, 3, state, config, dict.fromkeys(("reference", "train", "total"), 0.0), {})
    convert(checkpoint, "mlx", tmp_path / "b")
    assert same_bits(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(source)
    with pytest.raises(ModelError, match="no finished adapter"):
        convert(run, "mlx", tmp_path / "c")
    weights = checkpoint / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(RunError, match="SHA-256"):
        convert(checkpoint, "mlx", tmp_path / "c")


# --- Mixtures of experts ---------------------------------------------------------------------------------------------------------------


def mlx_experts(folder: Path, names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"), shared_a: bool = False, dtype: str = "BF16") -> Path:
    arrays, first = {}, None
    for name in names:
        into, out = (8, 16) if name == "down_proj" else (16, 8)
        path = f"model.layers.1.mlp.switch_mlp.{name}"
        a = draw(RNG, 4, 3, into, dtype=dtype)
        if shared_a and name != "down_proj":
            a = first = first or a
        arrays[f"{path}.lora_a"], arrays[f"{path}.lora_b"] = a, draw(RNG, 4, out, 3, dtype=dtype)
    config = {"lora_parameters": {"rank": 3, "scale": 2.0, "dropout": 0.0, "keys": sorted({n.rpartition(".")[0] for n in arrays})}, "num_layers": -1}
    return save(folder, "adapters.safetensors", arrays, config)


@pytest.mark.parametrize("shared_a", [False, True])
@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("gate_proj", "up_proj"), ("down_proj",)])
def test_experts_there_and_back_are_bitwise(tmp_path: Path, names: tuple[str, ...], shared_a: bool) -> None:
    base = str(experts_base(tmp_path / "m"))
    source = mlx_experts(tmp_path / "a", names, shared_a)
    convert(source, "peft", tmp_path / "b", base)
    owner = "model.layers.1.mlp.experts"
    config, arrays = config_of(tmp_path / "b"), weights_of(tmp_path / "b")
    fused = "gate_proj" in names
    assert config["target_parameters"] == [f"{owner}.{n}" for n in ("down_proj", "gate_up_proj") if (n == "gate_up_proj" and fused) or n in names]
    assert config["target_modules"] == []
    if fused:
        inner = f"{owner}.base_layer" if "down_proj" in names else owner
        rank = 3 if shared_a else 6
        a, b = arrays[f"{PREFIX}{inner}.lora_A.weight"], arrays[f"{PREFIX}{inner}.lora_B.weight"]
        assert a.shape == (4 * rank, 16) and b.shape == (16, 4 * rank)
        # peft's own reading of the two: A.reshape(E, r, in), B.reshape(out, r, E)
        delta = np.einsum("ore,eri->eoi", b.values().reshape(16, rank, 4), a.values().reshape(4, rank, 16))
        own = weights_of(source)
        for half, name in ((slice(0, 8), "gate_proj"), (slice(8, 16), "up_proj")):
            path = f"model.layers.1.mlp.switch_mlp.{name}"
            np.testing.assert_allclose(delta[:, half], own[f"{path}.lora_b"].values() @ own[f"{path}.lora_a"].values(), atol=1e-12)
    convert(tmp_path / "b", "mlx", tmp_path / "c", base)
    assert same_bits(source, tmp_path / "c")


def test_one_half_of_a_fused_weight(tmp_path: Path) -> None:
    base = str(experts_base(tmp_path / "m"))
    source = mlx_experts(tmp_path / "a", ("up_proj",))
    assert convert(source, "peft", tmp_path / "b", base).difference < 1e-12
    convert(tmp_path / "b", "mlx", tmp_path / "c", base)
    own, back = weights_of(source), weights_of(tmp_path / "c")
    assert all(back[name].same(own[name]) for name in own)
    assert not back["model.layers.1.mlp.switch_mlp.gate_proj.lora_b"].raw.any()  # there now, and adds nothing


def per_expert(folder: Path, experts: int, style: str = "qwen") -> Path:
    names = {"qwen": ("mlp", ("gate_proj", "up_proj", "down_proj")), "mixtral": ("block_sparse_moe", ("w1", "w3", "w2"))}[style]
    arrays = {}
    for expert in range(experts):
        for name in names[1]:
            into, out = (8, 16) if name in ("down_proj", "w2") else (16, 8)
            path = f"{PREFIX}model.layers.0.{names[0]}.experts.{expert}.{name}"
            arrays[f"{path}.lora_A.weight"], arrays[f"{path}.lora_B.weight"] = draw(RNG, 2, into), draw(RNG, out, 2)
    return save(folder, "adapter_model.safetensors", arrays, {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": list(names[1])})


@pytest.mark.parametrize("style", ["qwen", "mixtral"])
def test_adapters_on_single_experts_are_stacked(tmp_path: Path, style: str) -> None:
    kind, place, first = ("qwen3_moe", "mlp", "gate_proj") if style == "qwen" else ("mixtral", "block_sparse_moe", "w1")
    base = experts_base(tmp_path / "m", kind)
    source = per_expert(tmp_path / "a", 4, style)
    convert(source, "mlx", tmp_path / "b", str(base))
    stacked, own = weights_of(tmp_path / "b"), weights_of(source)
    for expert in range(4):
        one = own[f"{PREFIX}model.layers.0.{place}.experts.{expert}.{first}.lora_A.weight"]
        np.testing.assert_array_equal(stacked[f"model.layers.0.{place}.switch_mlp.gate_proj.lora_a"].raw[expert], one.raw)
    with pytest.raises(ModelError, match=r"where all 4 have one.*here 3 have"):
        convert(per_expert(tmp_path / "c", 3, style), "mlx", tmp_path / "d", str(base))


def test_experts_that_cannot_be_carried(tmp_path: Path) -> None:
    base = str(experts_base(tmp_path / "m"))
    source = mlx_experts(tmp_path / "a")
    with pytest.raises(ModelError, match=r"depend on the model. Name it: --base"):
        convert(source, "peft", tmp_path / "x")
    with pytest.raises(ModelError, match="the experts of gemma4"):
        convert(source, "peft", tmp_path / "x", str(experts_base(tmp_path / "g", "gemma4")), compare=True)
    with pytest.raises(ModelError, match="are no experts of qwen3_moe"):
        convert(source, "peft", tmp_path / "x", str(experts_base(tmp_path / "n", experts=8)))
    edit(source, fine_tune_type="dora")
    with pytest.raises(ModelError, match="DoRA has lora_a, lora_b, m"):
        convert(source, "peft", tmp_path / "x", base)
    convert(mlx_experts(tmp_path / "b"), "peft", tmp_path / "c", base)
    edit(tmp_path / "c", target_parameters=["experts.down_proj"])
    with pytest.raises(ModelError, match=r"names 1 of its parameters .* weights are for 2"):
        convert(tmp_path / "c", "mlx", tmp_path / "x", base)
    with pytest.raises(ModelError, match=r"do not fit a model of width 32. Older versions of peft"):
        edit(tmp_path / "c", target_parameters=["experts.down_proj", "experts.gate_up_proj"])
        convert(tmp_path / "c", "mlx", tmp_path / "x", str(experts_base(tmp_path / "w", hidden=32)))
    dense = ["model.layers.0.mlp.down_proj"]
    with pytest.raises(ModelError, match="peft takes a module of this name in qwen3_moe for the routed experts"):
        convert(mlx_folder(tmp_path / "d", dense), "peft", tmp_path / "x", base)
    assert not (tmp_path / "x").exists()


# --- What is refused -------------------------------------------------------------------------------------------------------------------

REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA"),
    ({"peft_type": ["LORA"]}, "only LORA"),
    ({"bias": "all"}, "trained biases"),
    ({"lora_bias": True}, "biases inside LoRA"),
    ({"modules_to_save": ["lm_head"]}, "fully trained modules"),
    ({"trainable_token_indices": [1]}, "trained token embeddings"),
    ({"alora_invocation_tokens": [1]}, "aLoRA"),
    ({"layer_replication": [[0, 1]]}, "replicated layers"),
    ({"use_qalora": True}, "QALoRA"),
    ({"kasa_config": {"x": 1}}, "KaSA"),
    ({"tomorrow": {"x": 1}}, "'tomorrow' is an option this version does not know"),
    ({"init_lora_weights": "pissa"}, "changed the base weights"),
    ({"init_lora_weights": "loftq"}, "changed the base weights"),
    ({"init_lora_weights": 1}, "changed the base weights"),
    ({"r": 8}, "do not fit rank 8"),
    ({"r": 0}, "r must be a whole number"),
    ({"r": True}, "r must be a whole number"),
    ({"lora_alpha": "8"}, "lora_alpha must be a number"),
    ({"lora_alpha": 10**400}, "lora_alpha must be a number .got a huge number"),
    ({"use_dora": True}, "lacks a magnitude"),
    ({"use_dora": 1}, "use_dora must be true or false"),
    ({"use_rslora": "yes"}, "use_rslora must be true or false"),
    ({"rank_pattern": [1]}, "rank_pattern must be a mapping"),
    ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern must be a whole number"),
    ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern must be a number"),
    ({"rank_pattern": {"(": 4}}, "no regular expression"),
    ({"rank_pattern": {"(a+)+b": 4}}, "too involved"),
    ({"rank_pattern": {".*.*.*.*.*x": 4}}, "too involved"),
    ({"target_modules": ["q_proj"]}, "target_modules and its kin leave out"),
    ({"target_modules": 3}, "target_modules must be a list"),
    ({"layers_to_transform": [0]}, "layers.1.* leave out"),
    ({"layers_to_transform": "x"}, "must be layer numbers"),
    ({"exclude_modules": ["up_proj"]}, "up_proj.* leave out"),
    ({"lora_dropout": 1.5}, "lora_dropout must be at least 0"),
    ({"base_model_name_or_path": "a\x1b[2Jb"}, "must be a line of text"),
    ({"base_model_name_or_path": "\ud800"}, "must be a line of text"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS, ids=[json.dumps(changes)[:50] for changes, _ in REFUSALS])
def test_peft_options_that_cannot_be_carried(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = peft_folder(tmp_path / "a")
    edit(source, **changes)
    before = snapshot(source)
    with pytest.raises(ModelError, match=message):
        convert(source, "mlx", tmp_path / "b")
    assert snapshot(source) == before and sorted(p.name for p in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("changes", [{"loftq_config": {}}, {"megatron_core": "megatron.core"}, {"layers_to_transform": [0, 1]}, {"target_modules": "all-linear"}, {"tomorrow": None}])
def test_peft_options_that_change_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    source = peft_folder(tmp_path / "a")
    edit(source, **changes)
    assert convert(source, "mlx", tmp_path / "b").modules == len(TARGETS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fine_tune_type": "full"}, "only lora and dora"),
        ({"fine_tune_type": "dora"}, "DoRA has lora_a, lora_b, m"),
        ({"lora_parameters": None}, "lora_parameters is missing"),
        ({"lora_parameters": {"rank": 4, "alpha": 8}}, "lora_parameters.scale must be a number"),
        ({"lora_parameters": {"rank": 8, "scale": 1.0}}, "do not fit rank 8"),
        ({"lora_parameters": {"rank": 4, "scale": 1.0, "keys": ["self_attn.q_proj"]}}, "keys and num_layers leave out"),
        ({"lora_parameters": {"rank": 4, "scale": 1.0, "dropout": -1}}, "dropout must be"),
        ({"num_layers": "2"}, "num_layers must be a whole number"),
    ],
)
def test_mlx_options_that_cannot_be_carried(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = mlx_folder(tmp_path / "a")
    edit(source, **changes)
    with pytest.raises(ModelError, match=message):
        convert(source, "peft", tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_blocks_that_mlx_would_not_adapt(tmp_path: Path, tiny_llama: Path) -> None:
    source = mlx_folder(tmp_path / "a", num_layers=1, lora_parameters={"rank": 4, "scale": 1.0})
    with pytest.raises(ModelError, match=r"weights for model\.layers\.0.*leave out"):
        convert(source, "peft", tmp_path / "b", str(tiny_llama))
    edit(source, num_layers=0)  # mlx-lm: every block
    assert convert(source, "peft", tmp_path / "b", str(tiny_llama)).modules == len(TARGETS)


def test_an_alpha_that_mlx_ignores_is_told(tmp_path: Path) -> None:
    source = mlx_folder(tmp_path / "a", lora_parameters={"rank": 4, "scale": 10.0, "alpha": 16, "keys": TARGETS})
    assert any("alpha is not used by mlx-lm" in note for note in convert(source, "peft", tmp_path / "b").notes)


def with_weights(tmp_path: Path, changes: dict[str, Tensor | None]) -> Path:
    source = peft_folder(tmp_path / "a")
    arrays, config = weights_of(source), config_of(source)
    for name, tensor in changes.items():
        arrays.pop(name, None)
        if tensor is not None:
            arrays[name] = tensor
    shutil.rmtree(source)
    return save(source, "adapter_model.safetensors", arrays, config)


A = f"{PREFIX}{TARGETS[0]}.lora_A.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({A: None}, "lora_A is missing"),
        ({A: draw(RNG, 3, 64)}, "do not fit rank 4"),
        ({A: draw(RNG, 4)}, "do not fit rank 4"),
        ({A: from_values(np.full((4, 64), np.nan), "F32")}, "NaN or infinity"),
        ({A: from_values(np.full((4, 64), np.inf), "BF16")}, "NaN or infinity"),
        ({A: Tensor("I32", np.ones((4, 64), np.int32))}, "is 'I32'"),
        ({A.removeprefix("base_model."): draw(RNG, 4, 64)}, "does not begin with base_model.model."),
        ({f"{PREFIX}{TARGETS[0]}.lora_A.default.weight": draw(RNG, 4, 64)}, "is no LoRA weight"),
        ({f"{PREFIX}{TARGETS[0]}.bias": draw(RNG, 64)}, "is no LoRA weight"),
        ({f"{PREFIX}{TARGETS[0]}.lora_embedding_A": draw(RNG, 4, 64)}, "lora_embedding_B is missing"),
        ({f"{PREFIX}{TARGETS[0]}.lora_magnitude_vector": draw(RNG, 64)}, "has a magnitude, and use_dora is false"),
        ({f"{PREFIX}model.embed_tokens.base_layer.weight": draw(RNG, 384, 64)}, "a whole weight beside the adapter.*--base"),
        ({f"{PREFIX}model.layers.0.mlp.experts.lora_A.weight": draw(RNG, 4, 64)}, "mixture-of-experts.*--base"),
        ({"\x1b[2J": draw(RNG, 4, 64)}, "is no name of a weight"),
    ],
    ids=lambda v: None if isinstance(v, dict) else v[:25],
)
def test_weights_that_cannot_be_carried(tmp_path: Path, changes: dict[str, Tensor | None], message: str) -> None:
    source = with_weights(tmp_path, changes)
    with pytest.raises(ModelError, match=message):
        convert(source, "mlx", tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_a_saved_copy_of_the_base_is_left_out_and_a_trained_one_refused(tmp_path: Path, tiny_llama: Path) -> None:
    paths = [*TARGETS, "lm_head"]
    own = tensors.read(tiny_llama / "model.safetensors")["lm_head.weight"]
    for name, weight in (("copy", own), ("trained", own * 1.01)):
        source = peft_folder(tmp_path / name, paths)
        arrays, config = weights_of(source), config_of(source)
        arrays[f"{PREFIX}lm_head.base_layer.weight"] = Tensor("F32", weight.astype(np.float32))
        shutil.rmtree(source)
        save(source, "adapter_model.safetensors", arrays, config)
    assert any("left out" in note for note in convert(tmp_path / "copy", "mlx", tmp_path / "a", str(tiny_llama)).notes)
    assert set(weights_of(tmp_path / "a")) == {f"{path}.{part}" for path in paths for part in ("lora_a", "lora_b")}
    with pytest.raises(ModelError, match=r"differs from the base's.*fully trained"):
        convert(tmp_path / "trained", "mlx", tmp_path / "b", str(tiny_llama))


def test_embeddings_and_heads_need_the_base(tmp_path: Path, tiny_llama_tied: Path) -> None:
    for name, paths in (("e", ["model.embed_tokens"]), ("h", ["lm_head"]), ("both", ["model.embed_tokens", "lm_head"])):
        source = peft_folder(tmp_path / name, paths)
        with pytest.raises(ModelError, match=r"ties its head to its embeddings decides.*--base"):
            convert(source, "mlx", tmp_path / "x")
        with pytest.raises(ModelError, match=r"ties.*cannot be carried.*ensure_weight_tying"):
            convert(source, "mlx", tmp_path / "x", str(tiny_llama_tied))
    with pytest.raises(ModelError, match=r"tied output head.*--base"):
        convert(mlx_folder(tmp_path / "m", ["model.embed_tokens"]), "peft", tmp_path / "x")
    with pytest.raises(ModelError, match="has no head of its own"):
        convert(mlx_folder(tmp_path / "n", ["lm_head"]), "peft", tmp_path / "x", str(tiny_llama_tied))
    assert not (tmp_path / "x").exists()


def test_dora_on_an_embedding_means_two_things(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="each dimension a magnitude, mlx-lm each token"):
        convert(peft_folder(tmp_path / "a", ["model.embed_tokens"], dora=True), "mlx", tmp_path / "x", str(tiny_llama))


def test_another_base(tmp_path: Path, tiny_llama: Path) -> None:
    source = peft_folder(tmp_path / "a", ["model.layers.7.self_attn.q_proj"])
    with pytest.raises(ModelError, match=r"has no weight model\.layers\.7\.self_attn\.q_proj\.weight.*Is this the model"):
        convert(source, "mlx", tmp_path / "x", str(tiny_llama))
    shaped = with_weights(tmp_path / "s", {A: draw(RNG, 4, 65)})
    with pytest.raises(ModelError, match=r"is \[64, 64\]; the adapter is for \[64, 65\]"):
        convert(shaped, "mlx", tmp_path / "x", str(tiny_llama))
    with pytest.raises(ModelError, match=r"config\.json: missing"):
        convert(source, "mlx", tmp_path / "x", str(tmp_path))


def test_the_model_that_the_adapter_names(tmp_path: Path, make_tiny_llama: Any) -> None:
    base = make_tiny_llama()
    source = peft_folder(tmp_path / "a", base_model_name_or_path=str(base))
    assert convert(source, "mlx", tmp_path / "b").notes == () and config_of(tmp_path / "b")["num_layers"] == 2
    assert config_of(tmp_path / "b")["model"] == str(base)
    (base / "model.safetensors").unlink()
    notes = convert(source, "mlx", tmp_path / "c").notes
    assert "is of no use" in notes[0] and "no .safetensors weights" in notes[0] and "not at hand" in notes[1]
    with pytest.raises(ModelError, match=r"--verify: needs the base model; .*of no use"):
        convert(source, "mlx", tmp_path / "d", compare=True)
    edit(source, base_model_name_or_path="someone/elsewhere")
    with pytest.raises(ModelError, match=r"--verify: needs the base model; the adapter names none"):
        convert(source, "mlx", tmp_path / "d", compare=True)


def test_families(tmp_path: Path) -> None:
    source = peft_folder(tmp_path / "a")
    base = experts_base(tmp_path / "m")

    def family(kind: str) -> str:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "model_type": kind, "quantization_config": {"x": 1}}))
        return str(base)

    with pytest.raises(ModelError, match=r"model_type llama4: .*cannot be carried.*arranged differently"):
        convert(source, "mlx", tmp_path / "x", family("llama4"))
    with pytest.raises(ModelError, match=r"model_type brandnew: .*Add --verify"):
        convert(source, "mlx", tmp_path / "x", family("brandnew"))
    assert convert(source, "peft", tmp_path / "p", family("brandnew")).modules == 8  # the names stay transformers' own
    vision = with_weights(tmp_path / "v", {})
    with pytest.raises(ModelError, match="gemma3 has no such module in mlx-lm"):
        convert(vision, "mlx", tmp_path / "x", family("gemma3"))
    odd = peft_like(tmp_path / "o", "model.layers.0.self_attn.kv_b_proj")
    with pytest.raises(ModelError, match="the other library has embed_q and unembed_out instead"):
        convert(odd, "mlx", tmp_path / "x", family("deepseek_v3"))
    router = peft_like(tmp_path / "r", "model.layers.0.mlp.gate", target_parameters=["mlp.gate.weight"], target_modules=[])
    with pytest.raises(ModelError, match="no adapter on the router of glm4_moe"):
        convert(router, "mlx", tmp_path / "x", family("glm4_moe"))
    with pytest.raises(ModelError, match=r"depends on the model. Name it: --base"):
        convert(router, "mlx", tmp_path / "x")


def peft_like(folder: Path, path: str, **config: Any) -> Path:
    arrays = {f"{PREFIX}{path}.lora_A.weight": draw(RNG, 4, 16), f"{PREFIX}{path}.lora_B.weight": draw(RNG, 8, 4)}
    base = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [path.rpartition(".")[2]]}
    return save(folder, "adapter_model.safetensors", arrays, {**base, **config})


def test_former_paths_become_present_ones(tmp_path: Path) -> None:
    base = str(experts_base(tmp_path / "m", "gemma3"))
    old = peft_like(tmp_path / "a", "language_model.model.layers.0.self_attn.q_proj")
    convert(old, "mlx", tmp_path / "b", base)
    assert "language_model.model.layers.0.self_attn.q_proj.lora_a" in weights_of(tmp_path / "b")
    convert(tmp_path / "b", "peft", tmp_path / "c", base)
    assert f"{PREFIX}model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in weights_of(tmp_path / "c")


# --- Folders ---------------------------------------------------------------------------------------------------------------------------


def test_folders_that_are_no_adapter(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for source, message in (
        (tmp_path / "none", "no such adapter folder"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "empty", r"adapter_config\.json is missing"),
        (tiny_llama, "a model, not an adapter"),
    ):
        with pytest.raises(ModelError, match=message):
            convert(source, "mlx", tmp_path / "x")
    source = peft_folder(tmp_path / "a")
    (source / "adapter_model.safetensors").rename(source / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.bin: a pickle"):
        convert(source, "mlx", tmp_path / "x")
    edit(source, peft_type="LORA")
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"neither PEFT's .* nor mlx-lm's"):
        convert(source, "mlx", tmp_path / "x")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source = peft_folder(tmp_path / "a")
    before = snapshot(source)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for out in (source, tmp_path / "dangling", source / "adapter_config.json"):
        with pytest.raises(RunError, match="exists already"):
            convert(source, "mlx", out)
    with pytest.raises(RunError, match="there is no folder"):
        convert(source, "mlx", tmp_path / "x" / "y")
    with pytest.raises(UpoError, match="unknown format"):
        convert(source, "gguf", tmp_path / "x")
    assert snapshot(source) == before


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = peft_folder(tmp_path / "a")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        convert(source, "mlx", tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_the_self_check_sees_a_wrong_scale_or_a_lost_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from upo.convert import mlx_lm

    source, write = peft_folder(tmp_path / "a"), mlx_lm.write

    def wrong_scale(adapter: Any, base: Any) -> Any:
        files, notes = write(adapter, base)
        files.config["lora_parameters"]["scale"] *= 1.00001
        return files, notes

    def lost(adapter: Any, base: Any) -> Any:
        files, notes = write(adapter, base)
        for part in ("lora_a", "lora_b"):
            del files.tensors[f"{TARGETS[3]}.{part}"]
        return files, notes

    for broken, message in ((wrong_scale, "differs by 1e-05"), (lost, r"layers\.0\.mlp\.down_proj is only on one side")):
        monkeypatch.setattr(mlx_lm, "write", broken)
        with pytest.raises(ModelError, match=f"self-check failed: .*{message}"):
            convert(source, "mlx", tmp_path / "b")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
