"""Converted adapters in the stock loaders of both libraries: the same logits, and far from those of the model without adapter."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
mlx_lm = pytest.importorskip("mlx_lm")
import transformers  # noqa: E402
from convert_cases import config_of, same_bits, weights_of  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402
from tiny_families import DENSE, IDS, MIXTURES, write  # noqa: E402

from upo.convert.families import EXPERTS, SAME, SAME_LINEAR  # noqa: E402
from upo.convert.run import convert  # noqa: E402
from upo.errors import ModelError  # noqa: E402
from upo.models import model_config  # noqa: E402
from upo_mlx.device import mx  # noqa: E402

TOLERANCE = 1e-5  # float32 round-off over two layers at logits of 3 to 8; measured 4e-6
FAR = 0.3  # what an adapter here moves logits by, at least


@pytest.fixture(autouse=True)
def _on_cpu() -> Any:
    with mx.stream(mx.cpu), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def hf_logits(base: Path, adapter: Path | None = None, auto: Any = transformers.AutoModelForCausalLM) -> np.ndarray:
    """By transformers and stock peft; a weight that peft does not apply is an error."""
    net = auto.from_pretrained(base, dtype=torch.float32)
    if adapter:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(missing|unexpected|inconsistency).*")
            net = peft.PeftModel.from_pretrained(net, adapter)
    with torch.no_grad():
        return net.eval()(input_ids=torch.tensor(IDS)).logits.numpy()[0]


def mlx_logits(base: Path, adapter: Path | None = None, **config: Any) -> np.ndarray:
    """By stock mlx-lm: `mlx_lm.load` where the model has a tokenizer, else what that calls."""
    if (base / "tokenizer.json").exists():
        net = mlx_lm.load(str(base), adapter_path=adapter and str(adapter))[0]
    else:
        net, _ = load_model(base, model_config={**model_config(base)[0], **config})
        net = load_adapters(net, str(adapter)) if adapter else net
        net.eval()
    return np.array(net(mx.array(IDS)))[0]


def train_peft(base: Path, out: Path, auto: Any = transformers.AutoModelForCausalLM, dtype: Any = torch.float32, **options: Any) -> Path:
    """An adapter as peft saves it, with random weights."""
    torch.manual_seed(3)
    net = peft.get_peft_model(auto.from_pretrained(base, dtype=torch.float32), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **options}))
    for name, parameter in net.named_parameters():
        if "magnitude" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
            parameter.data = parameter.data.to(dtype)
    net.save_pretrained(out)
    return out


def train_mlx(base: Path, out: Path, layers: int = -1, rank: int = 4, scale: float = 2.0, keys: list[str] | None = None, dora: bool = False) -> Path:
    """An adapter as mlx_lm.lora saves it, with random weights."""
    options = {"rank": rank, "scale": scale, "dropout": 0.0, **({"keys": keys} if keys else {})}
    net, _ = load_model(base, model_config=model_config(base)[0])
    net.freeze()
    linear_to_lora_layers(net, layers, dict(options), use_dora=dora)
    mx.random.seed(3)
    found = dict(tree_flatten(net.trainable_parameters()))
    weights = {n: mx.random.uniform(0.5, 1.5, w.shape) if n.endswith(".m") else mx.random.normal(w.shape) * 0.1 for n, w in found.items()}
    out.mkdir()
    mx.save_safetensors(str(out / "adapters.safetensors"), weights)
    (out / "adapter_config.json").write_text(
        json.dumps({"model": str(base), "fine_tune_type": "dora" if dora else "lora", "num_layers": layers, "lora_parameters": options, "iters": 100, "seed": 0})
    )
    return out


def check(want: np.ndarray, got: np.ndarray, plain: np.ndarray, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(got, want, atol=tolerance, rtol=0)
    assert np.abs(want - plain).max() > FAR


SOME = ["q_proj", "down_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# name: options of peft, tied model, whether the way back is bitwise
FROM_PEFT: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "linear": ({"target_modules": ALL}, False, True),
    "linear, tied": ({"target_modules": "all-linear"}, True, True),
    "layers": ({"target_modules": SOME, "layers_to_transform": [0]}, False, True),
    "uneven": ({"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]}, False, True),
    "rslora": ({"target_modules": SOME, "use_rslora": True, "lora_alpha": 4}, False, True),
    "ranks": ({"target_modules": SOME, "rank_pattern": {"down_proj": 7}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}}, False, False),
    "ranks by two": ({"target_modules": SOME, "rank_pattern": {"down_proj": 8}, "alpha_pattern": {"down_proj": 3, "layers.1.self_attn.q_proj": 12}}, False, False),
    "dora": ({"target_modules": ALL, "use_dora": True}, False, True),
    "dora ranks": ({"target_modules": SOME, "use_dora": True, "rank_pattern": {"down_proj": 2}}, False, False),
    "embedding": ({"target_modules": [*SOME, "embed_tokens"]}, False, True),
    "head": ({"target_modules": [*SOME, "lm_head"]}, False, True),
    "head dora": ({"target_modules": ["lm_head"], "use_dora": True}, False, True),
    "embedding and head": ({"target_modules": [*SOME, "embed_tokens", "lm_head"]}, False, True),
    "embedding, tied": ({"target_modules": [*SOME, "embed_tokens"], "ensure_weight_tying": True}, True, True),
}


@pytest.mark.parametrize("kind", FROM_PEFT)
def test_from_peft_and_back(kind: str, tmp_path: Path, tiny_llama: Path, tiny_llama_tied: Path) -> None:
    options, tied, bitwise = FROM_PEFT[kind]
    base = tiny_llama_tied if tied else tiny_llama
    source = train_peft(base, tmp_path / "a", **options)
    convert(source, "mlx", tmp_path / "b", str(base))
    convert(tmp_path / "b", "peft", tmp_path / "c", str(base))
    want = hf_logits(base, source)
    check(want, mlx_logits(base, tmp_path / "b"), mlx_logits(base))
    check(want, hf_logits(base, tmp_path / "c"), hf_logits(base))
    own, back = weights_of(source), weights_of(tmp_path / "c")
    own = {name: tensor for name, tensor in own.items() if "base_layer" not in name}  # peft's copy of an adapted embedding
    assert own.keys() == back.keys()
    if bitwise:
        assert all(back[name].same(tensor) for name, tensor in own.items())


FROM_MLX: dict[str, tuple[dict[str, Any], bool]] = {
    "defaults": ({"scale": 20.0, "rank": 2}, False),
    "defaults, tied": ({}, True),
    "last block": ({"layers": 1}, False),
    "keys": ({"keys": ["self_attn.q_proj", "mlp.down_proj"], "layers": 2}, False),
    "paths": ({"keys": ["model.layers.0.self_attn.q_proj", "lm_head"], "scale": 1.3}, False),
    "dora": ({"dora": True}, False),
    "embedding": ({"keys": ["self_attn.q_proj", "model.embed_tokens"]}, False),
    "embedding, tied": ({"keys": ["self_attn.q_proj", "model.embed_tokens"], "scale": 0.7}, True),
    "embedding alone, tied": ({"keys": ["model.embed_tokens"]}, True),
}


@pytest.mark.parametrize("kind", FROM_MLX)
def test_from_mlx_and_back(kind: str, tmp_path: Path, tiny_llama: Path, tiny_llama_tied: Path) -> None:
    options, tied = FROM_MLX[kind]
    base = tiny_llama_tied if tied else tiny_llama
    source = train_mlx(base, tmp_path / "a", **options)
    convert(source, "peft", tmp_path / "b")  # the model is the one the adapter names
    convert(tmp_path / "b", "mlx", tmp_path / "c")
    want = mlx_logits(base, source)
    big = options.get("scale", 0) > 10
    check(want, hf_logits(base, tmp_path / "b"), hf_logits(base), 10 * TOLERANCE if big else TOLERANCE)  # at a scale of 20, logits of 20
    assert same_bits(source, tmp_path / "c")


def test_bfloat16_stays_bit_for_bit(tmp_path: Path, tiny_llama: Path) -> None:
    source = train_peft(tiny_llama, tmp_path / "a", dtype=torch.bfloat16, target_modules=ALL)
    result = convert(source, "mlx", tmp_path / "b", str(tiny_llama))
    convert(tmp_path / "b", "peft", tmp_path / "c", str(tiny_llama))
    assert result.dtypes == ("BF16",) and same_bits(source, tmp_path / "c")
    check(hf_logits(tiny_llama, source), mlx_logits(tiny_llama, tmp_path / "b"), mlx_logits(tiny_llama))


def test_a_run_in_both(tmp_path: Path, tiny_llama: Path) -> None:
    """peft -> upo -> mlx-lm, with two ranks and scales on the way."""
    source = train_peft(tiny_llama, tmp_path / "a", target_modules=SOME, rank_pattern={"down_proj": 2}, lora_alpha=5)
    (tmp_path / "run").mkdir()
    convert(source, "upo", tmp_path / "run" / "adapter", str(tiny_llama))
    convert(tmp_path / "run", "mlx", tmp_path / "b", str(tiny_llama))
    want = hf_logits(tiny_llama, source)
    check(want, hf_logits(tiny_llama, tmp_path / "run" / "adapter"), hf_logits(tiny_llama))
    check(want, mlx_logits(tiny_llama, tmp_path / "b"), mlx_logits(tiny_llama))


# --- Families --------------------------------------------------------------------------------------------------------------------------

KNOWN = sorted((SAME | SAME_LINEAR | {"gpt_neox"}) & set(DENSE))


@pytest.mark.parametrize("kind", KNOWN)
def test_dense_families(kind: str, tmp_path: Path) -> None:
    """Every linear layer of the decoder, by the names both libraries have for it; fused qkv (phi3, gpt_neox) as the one module it is."""
    family = DENSE[kind]
    base = tmp_path / "m"
    plain = write(kind, family, base)[0]
    source = train_peft(base, tmp_path / "a", target_modules="all-linear")
    convert(source, "mlx", tmp_path / "b", str(base))
    convert(tmp_path / "b", "peft", tmp_path / "c", str(base))
    want = hf_logits(base, source)
    gap = np.abs(mlx_logits(base) - plain).max()  # the libraries' own
    check(want, mlx_logits(base, tmp_path / "b"), plain, max(2 * TOLERANCE, 5 * gap))
    check(want, hf_logits(base, tmp_path / "c"), plain, 1e-7)
    assert same_bits(source, tmp_path / "c")


def test_every_family_of_the_tables_was_compared() -> None:
    assert set(KNOWN) >= SAME | SAME_LINEAR
    assert set(MIXTURES) >= set(EXPERTS)


EXPERT_PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize("kind", sorted(EXPERTS))
def test_experts(kind: str, tmp_path: Path) -> None:
    base = tmp_path / "m"
    plain = write(kind, MIXTURES[kind], base)[0]
    place = EXPERTS[kind]
    router = [f"{place.hf_router}.weight"] if place.mlx_router else []
    attention = ["q_a_proj", "o_proj"] if kind == "deepseek_v3" else ["q_proj", "o_proj"]
    patterns = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 3}}  # scale 1.5 everywhere
    source = train_peft(base, tmp_path / "a", target_modules=attention, target_parameters=EXPERT_PARAMETERS + router, **patterns)
    convert(source, "mlx", tmp_path / "b", str(base))
    convert(tmp_path / "b", "peft", tmp_path / "c", str(base))
    want = hf_logits(base, source)
    check(want, mlx_logits(base, tmp_path / "b"), plain)
    check(want, hf_logits(base, tmp_path / "c"), plain)
    assert same_bits(source, tmp_path / "c")


@pytest.mark.parametrize("names", [["gate_proj", "up_proj", "down_proj"], ["up_proj"], ["down_proj"]], ids="+".join)
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_from_mlx(kind: str, names: list[str], tmp_path: Path) -> None:
    """mlx-lm gives gate and up an A of their own: a block form of twice the rank in peft."""
    base = tmp_path / "m"
    plain = write(kind, MIXTURES[kind], base)[0]
    place = EXPERTS[kind]
    source = train_mlx(base, tmp_path / "a", keys=["self_attn.q_proj", str(place.mlx_router), *(f"{place.mlx}.{name}" for name in names)])
    convert(source, "peft", tmp_path / "b", str(base))
    convert(tmp_path / "b", "mlx", tmp_path / "c", str(base))
    want = mlx_logits(base, source)
    check(want, hf_logits(base, tmp_path / "b"), plain)
    check(want, mlx_logits(base, tmp_path / "c"), plain)
    if "gate_proj" in names:
        assert same_bits(source, tmp_path / "c")
        assert 8 in (config_of(tmp_path / "b")["r"], *config_of(tmp_path / "b")["rank_pattern"].values())


SHARED = {"qwen2_moe": ["mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"], "glm4_moe": ["mlp.gate_proj", "mlp.up_proj"]}


def test_a_dense_layer_of_a_mixture(tmp_path: Path) -> None:
    base = tmp_path / "m"
    plain = write("qwen2_moe", MIXTURES["qwen2_moe"], base)[0]
    source = train_mlx(base, tmp_path / "a", keys=SHARED["qwen2_moe"], scale=6.0)
    convert(source, "peft", tmp_path / "b", str(base))
    check(mlx_logits(base, source), hf_logits(base, tmp_path / "b"), plain)


def test_a_dense_layer_that_peft_takes_for_experts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When peft loads such an adapter as it is meant, the refusal can go."""
    import upo.convert.peft as writer

    base = tmp_path / "m"
    write("glm4_moe", MIXTURES["glm4_moe"], base)
    source = train_mlx(base, tmp_path / "a", keys=SHARED["glm4_moe"])
    with pytest.raises(ModelError, match="peft takes a module of this name in glm4_moe for the routed experts"):
        convert(source, "peft", tmp_path / "b", str(base))
    monkeypatch.setattr(writer, "_check_writable", lambda *_: None)
    convert(source, "peft", tmp_path / "b", str(base))
    with pytest.raises(UserWarning, match=r"missing adapter keys.*experts"):
        hf_logits(base, tmp_path / "b")


def vision_model(kind: str, folder: Path) -> None:
    from tiny_families import COMMON, ROPE

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    vision |= {"depth": 1, "embed_dim": 32, "num_heads": 4, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}
    kinds = transformers.CONFIG_MAPPING[kind]
    default = kinds()
    text = {**default.text_config.to_dict(), **COMMON, "head_dim": 8, "rope_parameters": ROPE}
    text.pop("pad_token_id"), text.pop("layer_types", None)
    if kind == "gemma3":
        text |= {"query_pre_attn_scalar": 8, "rope_parameters": {"full_attention": ROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}
        text |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    sections = {"qwen2_vl": [1, 1, 2], "qwen3_vl": [2, 1, 1]}.get(kind)
    tokens = {}
    if sections:
        text["rope_parameters"] = {**ROPE, "mrope_section": sections}
        tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    seen = default.vision_config
    config = kinds(text_config=text, vision_config={**seen.to_dict(), **{k: v for k, v in vision.items() if hasattr(seen, k)}}, tie_word_embeddings=False, **tokens)
    torch.manual_seed(0)
    net = transformers.AutoModelForImageTextToText.from_config(config).float()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    net.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["gemma3", "mistral3", "qwen2_vl", "qwen3_vl"])
def test_language_models_with_eyes(kind: str, tmp_path: Path) -> None:
    """The decoder has another prefix in each library; the vision tower is none of mlx-lm's."""
    base, auto = tmp_path / "m", transformers.AutoModelForImageTextToText
    vision_model(kind, base)
    raw = json.loads((base / "config.json").read_text())
    options = {"vocab_size": 96, "tie_word_embeddings": False, "text_config": {**model_config(base)[0]["text_config"], "tie_word_embeddings": False}}
    assert raw["model_type"] == kind
    source = train_peft(base, tmp_path / "a", auto, target_modules=r"(.*language_model.*(q_proj|o_proj|gate_proj|down_proj))|lm_head")
    convert(source, "mlx", tmp_path / "b", str(base))
    convert(tmp_path / "b", "peft", tmp_path / "c", str(base))
    want, plain = hf_logits(base, source, auto), hf_logits(base, None, auto)
    gap = np.abs(mlx_logits(base, **options) - plain).max()
    check(want, mlx_logits(base, tmp_path / "b", **options), plain, max(TOLERANCE, 5 * gap))
    check(want, hf_logits(base, tmp_path / "c", auto), plain, 1e-7)
    shutil.rmtree(tmp_path / "a")
    seeing = train_peft(base, tmp_path / "a", auto, target_modules=r".*(vision_tower|visual).*(qkv|q_proj|fc1|linear_fc1|gate_proj)")
    with pytest.raises(ModelError, match=f"{kind} has no such module in mlx-lm"):
        convert(seeing, "mlx", tmp_path / "x", str(base))
