"""Whether mlx-lm built what a configuration asks for: it drops keys that a family's code does not read, without an error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upo.errors import ModelError
from upo_mlx.device import nn

_REMEDY = "Use --backend torch, or another model."


def check_rope(folder: Path, net: nn.Module, config: Mapping[str, Any]) -> None:
    """Raise ModelError if the network's rotary embeddings are not those of a repaired configuration: base, partial factor or scaling.

    Seen in mlx-lm 0.32: no scaling in Cohere, Gemma, Gemma 2, Helium, Mixtral, Phi, Qwen3-MoE, StableLM and Starcoder2; the whole head
    rotated in GLM, whatever its partial factor.
    """
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    ropes = [module for _, module in net.named_modules() if isinstance(module, nn.RoPE)]
    scaled = any("rope" in type(module).__name__.lower() and not isinstance(module, nn.RoPE) for _, module in net.named_modules())
    if not ropes:  # of a kind of their own, which mlx-lm chose for this configuration
        return
    kind = str(text.get("model_type"))
    scaling = text.get("rope_scaling") or {}
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    # `dynamic` changes nothing up to max_position_embeddings.
    if rope_type not in ("default", "dynamic") and not scaled and all(rope.scale == 1.0 for rope in ropes):
        raise ModelError(f"{folder}: mlx-lm ignores the rotary scaling ({rope_type}) of a {kind} model; its answers would be wrong. {_REMEDY}")
    wanted = {text.get(key) for key in ("rope_theta", "rope_local_base_freq", "rotary_emb_base")} - {None}
    if wanted and not scaled and not any(rope.base in wanted for rope in ropes):
        raise ModelError(f"{folder}: mlx-lm uses a rotary base of {ropes[0].base:g} for this {kind} model, config.json says {max(wanted):g}. {_REMEDY}")
    factor = text.get("partial_rotary_factor")
    size = text.get("head_dim") or (text.get("hidden_size") or 0) // (text.get("num_attention_heads") or 1)
    if factor not in (None, 1.0) and all(rope.dims == size for rope in ropes):
        raise ModelError(f"{folder}: mlx-lm rotates whole heads of a {kind} model, config.json says {factor:g} of them; its answers would be wrong. {_REMEDY}")


def window_notes(net: nn.Module, config: Mapping[str, Any], tokens: int) -> list[str]:
    """A note if sequences of up to `tokens` exceed a sliding window that transformers applies and mlx-lm does not."""
    from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    window, kinds = text.get("sliding_window"), text.get("layer_types")
    unused = text.get("use_sliding_window") is False or (isinstance(kinds, list) and "sliding_attention" not in kinds)
    if type(window) is not int or unused or tokens <= window or any(isinstance(c, RotatingKVCache) for c in make_prompt_cache(net)):
        return []
    return [f"config.json: sliding_window {window} is not applied by mlx-lm: beyond that length a token sees more there than in transformers."]
