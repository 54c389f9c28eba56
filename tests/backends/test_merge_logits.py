"""A merged model answers like base + adapter: the same logits and the same greedy continuation, in transformers and in mlx-lm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("mlx_lm")

import peft
import torch
import transformers
from tiny_families import DENSE, IDS, MIXTURES, write

from upo import tensors
from upo.convert.families import SAME
from upo.convert.merge import merge
from upo.convert.merge_source import Source, dequantised
from upo.convert.run import convert
from upo.errors import ModelError
from upo.models import is_quantized_mlx, model_config, read_json
from upo_mlx.device import mx
from upo_mlx.quantize import write_model

FAMILIES = {**DENSE, **MIXTURES}
NEW = 8  # tokens of the greedy continuation
TOLERANCE = 2e-5  # float32 round-off of two tiny layers at logits of 3; the adapters here move them by more than 0.1


@pytest.fixture(autouse=True)
def _on_cpu() -> Any:
    with mx.stream(mx.cpu):
        yield


def greedy(logits: Any) -> list[int]:
    """Continuation of IDS; `logits(ids [1, T]) -> [1, T, V]`."""
    ids = IDS.copy()
    for _ in range(NEW):
        ids = np.concatenate([ids, logits(ids)[:, -1:].argmax(-1)], axis=1)
    return ids[0, IDS.shape[1] :].tolist()


def in_torch(model: Any) -> Any:
    def logits(ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor(ids)).logits.float().numpy()

    return logits


def hf(folder: Path) -> Any:
    return in_torch(transformers.AutoModelForCausalLM.from_pretrained(folder).eval())


def mlx(folder: Path, adapter: Path | None = None) -> Any:
    """mlx-lm with its own loader, configuration as it is on disk."""
    from mlx_lm.utils import load_adapters, load_model

    net, _ = load_model(folder)
    if adapter is not None:
        net = load_adapters(net, str(adapter))
        net.eval()
    return lambda ids: np.array(net(mx.array(ids)).astype(mx.float32))


def same(got: Any, want: Any, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(got(IDS), want(IDS), atol=tolerance, rtol=0)
    assert greedy(got) == greedy(want)


def make(kind: str, folder: Path, changes: dict[str, Any], **lora: Any) -> Any:
    """Base and PEFT adapter on disk; returns logits of both together, by peft."""
    base = write(kind, FAMILIES[kind], folder / "base", **changes)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    model = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "init_lora_weights": True, **lora})).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(0, 0.2)
            elif "magnitude" in name:
                parameter.mul_(1.2)
    tied = lora.get("ensure_weight_tying")
    if tied:  # what training keeps equal, and the loop above did not
        parameters = dict(model.named_parameters())
        one = {side: next(p for n, p in parameters.items() if f"embed_tokens.lora_embedding_{side}" in n) for side in "AB"}
        for side, other in (("A", "B"), ("B", "A")):
            next(p for n, p in parameters.items() if f"lm_head.lora_{side}" in n).data = one[other].data.T.clone()
    model.save_pretrained(folder / "adapter")
    logits = in_torch(model)
    assert np.abs(logits(IDS) - base).max() > 0.1, "the adapter does nothing"
    return logits


TIED = {"tie_word_embeddings": True}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "linear": ("llama", {}, {"target_modules": ["q_proj", "down_proj"]}),
    "some layers": ("qwen3", {}, {"target_modules": ["v_proj"], "layers_to_transform": [1]}),
    "rslora, ranks and alphas": ("qwen2", {}, {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "rank_pattern": {"up_proj": 7}, "alpha_pattern": {"q_proj": 3}}),
    "dora": ("llama", {}, {"target_modules": ["k_proj", "gate_proj"], "use_dora": True}),
    "fused": ("phi3", {}, {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "untied embedding and head": ("llama", {}, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "tied both": ("llama", TIED, {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}),
    "tied head alone": ("llama", TIED, {"target_modules": ["lm_head", "q_proj"]}),
    "tied embedding alone": ("qwen3", TIED, {"target_modules": ["embed_tokens"]}),
    "norms of its own": ("gemma2", TIED, {"target_modules": ["o_proj", "down_proj"]}),
    "experts": ("qwen3_moe", {}, {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "experts with other names on disk": ("mixtral", {}, {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.gate.weight"]}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_peft_adapters(case: str, tmp_path: Path) -> None:
    kind, changes, lora = CASES[case]
    want = make(kind, tmp_path, changes, **lora)
    result = merge(tmp_path / "adapter", tmp_path / "hf", str(tmp_path / "base"))
    merge(tmp_path / "adapter", tmp_path / "mlx", str(tmp_path / "base"), "mlx")
    same(hf(tmp_path / "hf"), want)
    same(mlx(tmp_path / "hf"), want)
    same(mlx(tmp_path / "mlx"), want)
    untied = case in ("tied head alone", "tied embedding alone")
    assert read_json(tmp_path / "hf" / "config.json")["tie_word_embeddings"] is (bool(changes) and not untied)
    assert any("tie_word_embeddings = false" in note for note in result.notes) is untied
    header = tensors.read_header(tmp_path / "hf" / "model.safetensors")
    assert ("lm_head.weight" in header.entries) is (not changes or untied)


@pytest.mark.filterwarnings("ignore")
def test_an_untied_head_where_mlx_lm_has_none(tmp_path: Path) -> None:
    want = make("gemma2", tmp_path, TIED, target_modules=["lm_head"])
    with pytest.raises(ModelError, match=r"model_type gemma2: .*ensure_weight_tying"):
        merge(tmp_path / "adapter", tmp_path / "mlx", str(tmp_path / "base"), "mlx")
    assert any("mlx-lm cannot open this" in note for note in merge(tmp_path / "adapter", tmp_path / "hf", str(tmp_path / "base")).notes)
    same(hf(tmp_path / "hf"), want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["linear", "rslora, ranks and alphas", "dora", "tied both", "experts"])
def test_mlx_adapters(case: str, tmp_path: Path) -> None:
    kind, changes, lora = CASES[case]
    make(kind, tmp_path, changes, **lora)
    base = str(tmp_path / "base")
    convert(tmp_path / "adapter", "mlx", tmp_path / "adapters", base)
    config, _ = model_config(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))  # mlx-lm's own loader cannot repair it
    want = mlx(tmp_path / "base", tmp_path / "adapters")
    merge(tmp_path / "adapters", tmp_path / "hf", base)
    same(hf(tmp_path / "hf"), want)
    same(mlx(tmp_path / "hf"), want)


# --- Bases in mlx-lm's layout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(SAME & set(FAMILIES)))
def test_families_whose_weights_are_the_same_on_both_sides(kind: str, tmp_path: Path) -> None:
    """What allows a base that mlx-lm wrote to become a model in HF layout."""
    write(kind, FAMILIES[kind], tmp_path / "hf")
    (tmp_path / "mlx").mkdir()
    write_model(tmp_path / "hf", tmp_path / "mlx", None, 64)
    ours, theirs = (Source(tmp_path / name, {}) for name in ("hf", "mlx"))
    assert theirs.is_mlx and not ours.is_mlx and set(ours.weights) == set(theirs.weights)
    for name in ours.weights:
        one, two = (np.concatenate([piece for _, piece in s.rows(name)]) for s in (ours, theirs))
        np.testing.assert_array_equal(one, two, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 32), (4, 64), (4, 128), (5, 64), (6, 64), (8, 64)])
def test_dequantised_as_mlx_does(bits: int, group: int, dtype: str) -> None:
    weights = mx.array(np.random.default_rng(bits).normal(size=(24, 256)).astype(np.float32)).astype(getattr(mx, dtype))
    q, scales, biases = mx.quantize(weights, group_size=group, bits=bits)
    s, b = (np.array(x.astype(mx.float32)) for x in (scales, biases))
    exact = np.array(mx.dequantize(q, scales.astype(mx.float32), biases.astype(mx.float32), group_size=group, bits=bits))
    got = dequantised(np.array(q), s, b, bits)
    np.testing.assert_allclose(got, exact, atol=1e-6, rtol=0)  # one fused or two float32 roundings at values of 4
    if dtype != "float32":  # mlx rounds to the dtype of the scales, we do not until the end
        own = np.array(mx.dequantize(q, scales, biases, group_size=group, bits=bits).astype(mx.float32))
        np.testing.assert_allclose(got, own, atol={"float16": 4e-3, "bfloat16": 4e-2}[dtype], rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_quantised_base(kind: str, bits: int, tmp_path: Path) -> None:
    """The merged model is the quantised base + adapter, not the original + adapter."""
    original = make(kind, tmp_path, {"hidden_size": 64}, target_modules=["q_proj", "down_proj"])
    (tmp_path / "quantised").mkdir()
    write_model(tmp_path / "base", tmp_path / "quantised", bits, 64)
    assert is_quantized_mlx(read_json(tmp_path / "quantised" / "config.json"))
    convert(tmp_path / "adapter", "mlx", tmp_path / "adapters", str(tmp_path / "base"))
    want = mlx(tmp_path / "quantised", tmp_path / "adapters")
    result = merge(tmp_path / "adapters", tmp_path / "hf", str(tmp_path / "quantised"))
    assert "the base is quantised" in result.warnings[0] and "again" not in result.warnings[0]
    same(hf(tmp_path / "hf"), want)
    same(mlx(tmp_path / "hf"), want)
    assert np.abs(want(IDS) - original(IDS)).max() > 20 * TOLERANCE
    again = merge(tmp_path / "adapter", tmp_path / "again", str(tmp_path / "quantised"), "mlx", bits)
    assert f"Quantising to {bits} bits again" in again.warnings[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "olmoe"])
def test_a_mixture_in_mlx_layout_stays_there(kind: str, tmp_path: Path) -> None:
    parameters = {"target_parameters": ["mlp.experts.down_proj"]}
    want = make(kind, tmp_path, {}, target_modules=["q_proj"], **parameters)
    (tmp_path / "stacked").mkdir()
    write_model(tmp_path / "base", tmp_path / "stacked", None, 64)
    base = str(tmp_path / "stacked")
    with pytest.raises(ModelError, match=f"model_type {kind}: .*--to mlx"):
        merge(tmp_path / "adapter", tmp_path / "hf", base)
    merge(tmp_path / "adapter", tmp_path / "mlx", base, "mlx")
    same(mlx(tmp_path / "mlx"), want)


@pytest.mark.filterwarnings("ignore")
def test_quantised_for_mlx_lm(tmp_path: Path) -> None:
    want = make("llama", tmp_path, {"hidden_size": 64}, target_modules=["q_proj", "down_proj"])
    base = str(tmp_path / "base")
    merge(tmp_path / "adapter", tmp_path / "full", base)
    merged = tensors.read(tmp_path / "full" / "model.safetensors")
    gaps = {}
    for bits in (4, 8):
        out = tmp_path / f"bits{bits}"
        assert merge(tmp_path / "adapter", out, base, "mlx", bits).warnings == ()
        assert read_json(out / "config.json")["quantization"] == {"group_size": 64, "bits": bits, "mode": "affine"}
        stored = tensors.read(out / "model.safetensors")
        name = "model.layers.0.self_attn.q_proj"
        for part, value in zip(("weight", "scales", "biases"), mx.quantize(mx.array(merged[f"{name}.weight"]), group_size=64, bits=bits), strict=True):
            np.testing.assert_array_equal(stored[f"{name}.{part}"], np.array(value))
        gaps[bits] = np.abs(mlx(out)(IDS) - want(IDS)).max()
    assert 1e-4 < gaps[8] < gaps[4] / 4


def test_nothing_to_quantise(tmp_path: Path) -> None:
    make("llama", tmp_path, {}, target_modules=["q_proj"])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError, match="--bits 4: no layer of this model has inputs in whole groups of 64"):
        # hidden size 32, and 64 only in the feed-forward layer
        merge(tmp_path / "adapter", tmp_path / "out", str(write_narrow(tmp_path)), "mlx", 4)
    assert sorted(p for p in tmp_path.iterdir() if p.name != "narrow") == before


def write_narrow(folder: Path) -> Path:
    write("llama", FAMILIES["llama"], folder / "narrow", intermediate_size=48)
    return folder / "narrow"
