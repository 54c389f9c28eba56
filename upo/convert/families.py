"""What modules are called in transformers and in mlx-lm, family by family. Compared with both libraries; see docs/converting.md."""

from __future__ import annotations

from dataclasses import dataclass

from upo.errors import ModelError

# Every weight goes by the same name in both.
SAME = {
    "cohere", "cohere2", "ernie4_5", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "granite", "helium", "llama", "ministral3", "mistral",
    "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2",
}  # fmt: skip
# Every linear layer and embedding does; nothing is said of the other weights.
SAME_LINEAR = {"apertus", "exaone4", "hunyuan_v1_dense", "lfm2", "nemotron"}

# model_type: (prefix in transformers, prefix in mlx-lm), the first that fits wins
_VISION = (("model.language_model.", "language_model.model."), ("lm_head", "language_model.lm_head"))
PREFIXES: dict[str, tuple[tuple[str, str], ...]] = {
    "gemma3": _VISION,
    "gpt_neox": (("gpt_neox.layers.", "model.h."), ("gpt_neox.embed_in", "model.embed_in"), ("lm_head", "model.embed_out")),
    "mistral3": _VISION,
    "qwen2_vl": _VISION,
    "qwen3_vl": _VISION,
}
# Paths of transformers before 5, which still loads adapters that have them: model_type -> (then, now)
_FORMER: dict[str, tuple[tuple[str, str], ...]] = {
    "gemma3": (("language_model.model.", "model.language_model."), ("language_model.lm_head", "lm_head")),
    "mistral3": (("language_model.model.", "model.language_model."), ("language_model.lm_head", "lm_head")),
}


@dataclass(frozen=True)
class Experts:
    """Where a mixture-of-experts family keeps its routed experts and their router, relative to a decoder layer."""

    hf: str  # module with the parameters gate_up_proj [E, 2I, H] (gate first) and down_proj [E, H, I]
    mlx: str  # module with gate_proj, up_proj and down_proj [E, out, in]
    hf_router: str | None = None  # module whose `weight` is a bare parameter
    mlx_router: str | None = None  # linear layer; None if mlx-lm can put no adapter on the router


_SWITCH = Experts("mlp.experts", "mlp.switch_mlp", "mlp.gate", "mlp.gate")
_CLOSED_ROUTER = Experts("mlp.experts", "mlp.switch_mlp", "mlp.gate")
EXPERTS: dict[str, Experts] = {
    "deepseek_v3": _CLOSED_ROUTER,
    "dots1": Experts("mlp.experts", "mlp.experts", "mlp.gate"),
    "glm4_moe": _CLOSED_ROUTER,
    "granitemoe": Experts("block_sparse_moe.experts", "block_sparse_moe.switch_mlp"),  # its router is a linear layer like any other
    "mixtral": Experts("mlp.experts", "block_sparse_moe.switch_mlp", "mlp.gate", "block_sparse_moe.gate"),
    "olmoe": _SWITCH,
    "qwen2_moe": _SWITCH,
    "qwen3_moe": _SWITCH,
    "solar_open": _CLOSED_ROUTER,
}
# For these peft (0.21, under transformers 5) takes every module called gate_proj, up_proj or down_proj for the routed experts as it loads.
TAKEN_FOR_EXPERTS = set(EXPERTS) - {"granitemoe", "qwen2_moe"}

# Families whose modules are arranged differently in the two libraries, and why.
REFUSED: dict[str, str] = {
    "bitnet": "its ternary layers are of another kind in mlx-lm",
    "deepseek_v2": "mlx-lm splits kv_b_proj of its attention into embed_q and unembed_out",
    "deepseek_v32": "mlx-lm splits kv_b_proj of its attention into embed_q and unembed_out",
    "glm4_moe_lite": "mlx-lm splits kv_b_proj of its attention into embed_q and unembed_out",
    "gpt2": "its layers are stored transposed in transformers, and mlx-lm computes another GELU",
    "gpt_oss": "its experts are interleaved, and neither library loads the other's layout",
    "llama4": "its feed-forward layers and experts are arranged differently in mlx-lm",
    "llama4_text": "its feed-forward layers and experts are arranged differently in mlx-lm",
    "nanochat": "its layers have other names and another arrangement in mlx-lm",
    "nemotron_h": "its mixer layers are arranged differently in mlx-lm",
    "qwen3_next": "its linear-attention layers are arranged differently in mlx-lm",
}
_ODD = {"kv_b_proj": "embed_q and unembed_out", "embed_q": "kv_b_proj", "unembed_out": "kv_b_proj"}  # module of one library -> of the other

HEADS = ("lm_head", "embed_out", "output")
EMBEDDINGS = ("embed_tokens", "embed_in", "wte", "word_embeddings", "tok_embeddings", "embeddings", "embedding")


def check_family(model_type: str | None) -> None:
    """Raise ModelError for a family that cannot be carried."""
    if model_type in REFUSED:
        raise ModelError(f"model_type {model_type}: adapters of this family cannot be carried between transformers and mlx-lm: {REFUSED[model_type]}.")


def is_embedding(path: str) -> bool:
    return path.rpartition(".")[2] in EMBEDDINGS


def is_head(path: str) -> bool:
    return path.rpartition(".")[2] in HEADS and ".layers." not in path


def present(path: str, model_type: str | None) -> str:
    """Today's path of a module of transformers; that of an older version is turned into it."""
    for then, now in _FORMER.get(model_type or "", ()):
        if path.startswith(then):
            return now + path.removeprefix(then)
    return path.replace(".block_sparse_moe.", ".mlp.") if model_type == "mixtral" else path


def to_mlx(path: str, model_type: str | None) -> str:
    """mlx-lm's path of a module (no expert) of transformers'."""
    return _swapped(path, model_type, 0, 1)


def to_hf(path: str, model_type: str | None) -> str:
    """transformers' path of a module (no expert) of mlx-lm's."""
    return _swapped(path, model_type, 1, 0)


def _swapped(path: str, model_type: str | None, source: int, target: int) -> str:
    for pair in PREFIXES.get(model_type or "", ()):
        if path.startswith(pair[source]):
            return pair[target] + path.removeprefix(pair[source])
    if model_type in PREFIXES:
        raise ModelError(f"{path}: {model_type} has no such module in {'mlx-lm' if target else 'transformers'}; adapters on it cannot be carried.")
    name = path.rpartition(".")[2]
    if name in _ODD:
        raise ModelError(f"{path}: the other library has {_ODD[name]} instead; adapters on it cannot be carried.")
    layout = EXPERTS.get(model_type or "")
    if layout and layout.hf_router:
        router = (layout.hf_router, layout.mlx_router)
        if path.endswith(f".{router[source] or layout.hf_router}"):
            if layout.mlx_router is None:
                raise ModelError(f"{path}: mlx-lm can put no adapter on the router of {model_type}; it cannot be carried.")
            return path.removesuffix(f"{router[source]}") + f"{router[target]}"
    return path
