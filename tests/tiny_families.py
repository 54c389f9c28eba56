"""Tiny random models of many families, saved by transformers, with a rotary base that is nobody's default."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

COMMON: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 5e5}
HALF = {**ROPE, "partial_rotary_factor": 0.5}
IDS = np.arange(24)[None] * 7 % 96
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}


@dataclass(frozen=True)
class Family:
    """What a tiny model of it needs, and how mlx-lm reads transformers' config.json without repair."""

    options: dict[str, Any] = field(default_factory=dict)
    raw: str = "wrong"  # wrong: other logits; closed: an error; right
    tolerance: float = 2e-5  # float32 round-off of two layers, measured 1e-6 to 5e-6 at logits of 3


_GELU = 3e-3  # mlx-lm has GELU in another approximation than these configurations name: measured 3e-4 to 1.2e-3

DENSE: dict[str, Family] = {
    "apertus": Family(raw="closed"),
    "cohere": Family({"logit_scale": 1.0}),
    "cohere2": Family({"head_dim": 8, "logit_scale": 1.0, **SLIDING}, raw="closed"),
    "ernie4_5": Family({"head_dim": 8}, raw="closed"),
    "exaone4": Family(SLIDING, raw="closed"),
    "gemma": Family({"head_dim": 8}, tolerance=_GELU),
    "gemma2": Family({"head_dim": 8, "query_pre_attn_scalar": 8}),
    "gemma3_text": Family(
        {
            "head_dim": 8, "query_pre_attn_scalar": 8, **SLIDING,
            "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}, "sliding_attention": {"rope_type": "default", "rope_theta": 3e3}},
        },
        raw="closed",
        tolerance=_GELU,
    ),
    "glm": Family({"head_dim": 8, "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}}),
    "glm4": Family({"head_dim": 8, "rope_parameters": HALF}, raw="closed"),
    "gpt_neox": Family({"intermediate_size": 128, "rope_parameters": HALF}, raw="closed", tolerance=_GELU),
    "granite": Family(raw="closed"),
    "helium": Family({"head_dim": 8}, raw="closed"),
    "hunyuan_v1_dense": Family({"head_dim": 8}),
    "lfm2": Family({"layer_types": ["conv", "full_attention"]}, raw="closed"),
    "llama": Family(),
    "ministral3": Family(
        {"head_dim": 8, "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}},
        raw="right",
    ),
    "mistral": Family({"sliding_window": None}),
    "nemotron": Family({"rope_parameters": HALF}),
    "olmo2": Family(),
    "olmo3": Family(SLIDING, raw="closed"),
    "phi": Family({"num_key_value_heads": 4, "rope_parameters": HALF}, raw="closed"),
    "phi3": Family(),
    "qwen2": Family(),
    "qwen3": Family({"head_dim": 8}, raw="right"),
    "seed_oss": Family({"head_dim": 8}),
    "smollm3": Family({"no_rope_layers": [1, 0]}),
    "stablelm": Family({"rope_parameters": HALF}, raw="closed"),
    "starcoder2": Family(tolerance=_GELU),
}  # fmt: skip

MIXTURES: dict[str, Family] = {
    "deepseek_v3": Family({**ROUTED, **MLA}),
    "dots1": Family({**ROUTED, "n_shared_experts": 1}, raw="closed"),
    "glm4_moe": Family({**ROUTED, "head_dim": 8, "use_qk_norm": True, "rope_parameters": HALF}, raw="closed"),
    "granitemoe": Family({"num_local_experts": 4, "num_experts_per_tok": 2}, raw="closed"),
    "mixtral": Family({"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": Family({"num_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": Family({**EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": Family({**EXPERTS, "head_dim": 8}, raw="closed"),
    "solar_open": Family({**ROUTED, "head_dim": 8, "first_k_dense_replace": 0}, raw="closed"),
}

# Families that mlx-lm computes otherwise or does not open, whatever the configuration says.
LOST: dict[str, Family] = {
    "bitnet": Family(),
    "ernie4_5_moe": Family({"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1}),
    "gemma4_text": Family(
        {
            "head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, **SLIDING,
            "rope_parameters": {"full_attention": ROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 3e3}},
        }
    ),
    "gpt2": Family({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 128}),
    "gpt_oss": Family({"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **SLIDING}),
    "granitemoehybrid": Family({"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32, "layer_types": ["attention", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_d_state": 8}),
    "llama4_text": Family({"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1}),
    "minimax": Family({"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "nanochat": Family(),
    "olmo": Family(),
    "phimoe": Family({"num_local_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip


def write(kind: str, family: Family, folder: Path, **changes: Any) -> np.ndarray:
    """Save a tiny model of this family, float32, and return transformers' logits [1, 24, 96] for IDS."""
    import torch
    import transformers

    torch.manual_seed(0)
    options = copy.deepcopy({**COMMON, "rope_parameters": ROPE, **family.options, **changes})  # transformers fills in what it is given
    config = transformers.CONFIG_MAPPING[kind](**options)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases away from 1 and 0, and attention that depends on positions
            parameter.add_(torch.randn_like(parameter) * 0.15)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.add_(torch.randn_like(buffer) * 0.1)
        logits = model(torch.tensor(IDS)).logits.numpy()
    model.save_pretrained(folder)
    return logits


def reopened(folder: Path) -> np.ndarray:
    """transformers' logits of a folder."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()
