"""A Llama GGUF file as a folder in HF layout, with NumPy only: weights, config, tokenizer and chat template.

Used where the model hub cannot be reached. Quantised weights are expanded by the `gguf` package and stored as bfloat16.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from upo.errors import ModelError, UpoError
from upo.tensors import write

# GGUF name -> HF name; {i} is the layer.
TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL, USER_DEFINED = 3, 4  # token types of the GGUF specification


def convert(source: Path, folder: Path) -> None:
    """Write `folder` (which must exist) in HF layout from the GGUF file `source`.

    Raises ModelError for another architecture, tokenizer or tensor than a Llama with a SmolLM tokenizer has.
    """
    reader, dequantize = _open(source)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    architecture, pre = meta.get("general.architecture"), meta.get("tokenizer.ggml.pre")
    if architecture != "llama" or meta.get("tokenizer.ggml.model") != "gpt2" or pre != "smollm":
        raise ModelError(f'{source}: only Llama with a "smollm" tokenizer can be converted; this is {architecture} with "{pre}".')
    heads = {"attn_q": int(meta["llama.attention.head_count"]), "attn_k": int(meta["llama.attention.head_count_kv"])}
    tensors = {}
    for tensor in reader.tensors:
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        name, kind = hf_name(tensor.name, source)
        tensors[name] = unpermute(array, heads[kind]) if kind in heads else array
    write(folder / "model.safetensors", tensors, metadata={"format": "pt"}, dtypes=dict.fromkeys(tensors, "BF16"))
    _write(folder / "config.json", model_config(meta, tensors))
    special = {k: int(meta[f"tokenizer.ggml.{name}_token_id"]) for k, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    _write(folder / "generation_config.json", {f"{k}_token_id": v for k, v in special.items()})
    _tokenizer(meta).save(str(folder / "tokenizer.json"))
    tokens = meta["tokenizer.ggml.tokens"]
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": int(meta["llama.context_length"]),
            "clean_up_tokenization_spaces": False,
            **{f"{k}_token": tokens[v] for k, v in special.items()},
            "unk_token": tokens[int(meta["tokenizer.ggml.unknown_token_id"])],
        },
    )
    (folder / "chat_template.jinja").write_text(meta["tokenizer.chat_template"], encoding="utf-8")


def hf_name(name: str, source: Path) -> tuple[str, str]:
    """The HF name of a GGUF tensor, and its kind within the layer ("attn_q", or "" outside the layers)."""
    if name in TOP:
        return TOP[name], ""
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER and parts[3] == "weight":
        return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.weight", parts[2]
    raise ModelError(f"{source}: tensor {name} is not part of a Llama model as it is known here.")


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection [heads * d, in] in HF order.

    llama.cpp rotates neighbouring pairs (2 i, 2 i + 1) and therefore stores row i + h d / 2 of each head (h = 0, 1) at 2 i + h; HF
    rotates the pairs (i, i + d / 2).
    """
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def model_config(meta: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """config.json, with the rotary base in both spellings: transformers >= 5 reads `rope_parameters`, mlx-lm the top level."""
    heads, width, theta = int(meta["llama.attention.head_count"]), int(meta["llama.embedding_length"]), _short(meta["llama.rope.freq_base"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": int(meta["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(meta["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(meta["tokenizer.ggml.padding_token_id"]),
        "dtype": "bfloat16",
        "head_dim": width // heads,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": int(meta["llama.feed_forward_length"]),
        "max_position_embeddings": int(meta["llama.context_length"]),
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": int(meta["llama.block_count"]),
        "num_key_value_heads": int(meta["llama.attention.head_count_kv"]),
        "rms_norm_eps": _short(meta["llama.attention.layer_norm_rms_epsilon"]),
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_theta": theta,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "use_cache": True,
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
    }


def _tokenizer(meta: dict[str, Any]) -> Any:
    """Byte-level BPE as llama.cpp's "smollm": every digit on its own, then GPT-2's split."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = meta["tokenizer.ggml.token_type"]
    for kind in (CONTROL, USER_DEFINED):
        added = [AddedToken(t, normalized=False, special=kind == CONTROL) for t, k in zip(tokens, types, strict=True) if k == kind]
        tokenizer.add_special_tokens(added) if kind == CONTROL else tokenizer.add_tokens(added)
    return tokenizer


def _short(value: float) -> float:
    """The shortest decimal of a float32: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _open(source: Path) -> tuple[Any, Any]:
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError:
        raise UpoError(f'{source}: reading a GGUF file needs the package gguf. Install it with: pip install "upo[quickstart]"') from None
    try:
        return GGUFReader(str(source)), dequantize
    except (OSError, ValueError, IndexError) as error:
        raise ModelError(f"{source}: cannot be read as GGUF ({error}). Delete it and run again.") from None


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
