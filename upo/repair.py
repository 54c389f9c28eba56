"""What transformers >= 5 writes into config.json and mlx-lm reads elsewhere, or not at all: said in both spellings.

transformers nests (`rope_parameters`, `layer_types`) or leaves out what its class fixes; mlx-lm (0.32) reads flat keys and, where one is
missing, mostly takes a default of its own without an error. docs/models.md lists the families and what was measured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from upo.errors import ModelError

_EXPERT_KEYS = ("num_experts", "num_local_experts")
_THETA = ("rope_theta", "partial_rotary_factor")
_NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}  # mlx-lm's names in GPT-NeoX

# Keys that mlx-lm wants and transformers leaves out, as its class fixes or derives them.
_FACTS: dict[str, dict[str, Callable[[Mapping[str, Any]], Any]]] = {
    "apertus": {"mlp_bias": lambda c: False, "post_norm": lambda c: False, "qk_norm": lambda c: True},
    "exaone4": {"head_dim": lambda c: c["hidden_size"] // c["num_attention_heads"], "rope_scaling": lambda c: None},
    "glm4_moe": {"rope_scaling": lambda c: None},
    "lfm2": {"block_dim": lambda c: c["hidden_size"]},
    "solar_open": {"first_k_dense_replace": lambda c: 0, "partial_rotary_factor": lambda c: 1.0},
}
# Families of which mlx-lm takes the layers with a sliding window from a period, not from `layer_types`.
_PERIODIC = ("cohere2", "exaone4", "gemma3_text")

# Families that mlx-lm opens and computes otherwise than transformers, or that end the program.
WRONG_ON_MLX = {
    "ernie4_5_moe": "mlx-lm drops the correction bias of its router and picks other experts",
    "olmo": "mlx-lm's olmo is another one, which asks for the package ai2-olmo and ends the program without it",
}
# Families whose models, as transformers 5 saves them, mlx-lm refuses to open.
CLOSED_TO_MLX = {
    "bitnet": "its ternary weights are packed in mlx-lm",
    "gemma4_text": "mlx-lm cannot tell the head size of its full-attention layers",
    "gpt2": "mlx-lm expects names without `transformer.`",
    "gpt_oss": "mlx-lm reads its experts in MXFP4 only",
    "granitemoehybrid": "mlx-lm expects other names of its kinds of layers",
    "llama4_text": "mlx-lm expects its experts under other names",
    "minimax": "mlx-lm's is the later MiniMax-M2, without linear attention",
    "nanochat": "mlx-lm expects other names of its weights",
    "phimoe": "mlx-lm expects its router under another name",
}


def repair_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A copy that transformers and mlx-lm read alike, and a note on each value that was added or changed.

    Both spellings of the rotary embedding (`rope_parameters`; `rope_theta`, `rope_scaling`, `partial_rotary_factor`), of the number of
    experts and of the layers with a sliding window are present and agree. Where they disagree, the value that transformers would use
    wins. A nested `text_config` is repaired too. Repairing twice changes nothing.
    """
    result: dict[str, Any] = copy.deepcopy(dict(config))
    notes: list[str] = []
    _repair_rope(result, notes)
    known = [key for key in _EXPERT_KEYS if result.get(key) is not None]
    if len(known) == 1:
        other = next(key for key in _EXPERT_KEYS if key != known[0])
        result[other] = result[known[0]]
        notes.append(f"config.json: {other} = {result[other]}, copied from {known[0]}.")
    _repair_family(result, notes)
    if isinstance(result.get("text_config"), dict):
        result["text_config"], inner = repair_config(result["text_config"])
        notes += [note.replace("config.json:", "config.json, text_config:", 1) for note in inner]
    return result, notes


def _repair_rope(config: dict[str, Any], notes: list[str]) -> None:
    rope = config.get("rope_scaling") or config.get("rope_parameters")  # in transformers' order
    if isinstance(rope, dict) and any(isinstance(value, dict) for value in rope.values()):
        # One set per kind of layer; the top level describes the full-attention layers, and Gemma 3 names the others' base apart.
        local = rope.get("sliding_attention")
        if isinstance(local, dict) and "rope_theta" in local:
            _set(config, "rope_local_base_freq", local["rope_theta"], notes)
        rope = rope.get("full_attention")
    elif config.get("rope_theta") is not None or isinstance(rope, dict):
        old = config.get("rope_parameters") if isinstance(config.get("rope_parameters"), dict) else None
        rope = dict(rope or {})
        for key in _THETA:
            if config.get(key) is not None:
                rope.setdefault(key, config[key])
        kind = rope.pop("type", "default")  # the older name of rope_type
        rope.setdefault("rope_type", kind)
        config["rope_parameters"] = rope
        if old is not None and old.get("rope_theta") not in (None, rope.get("rope_theta")):
            notes.append(
                f"config.json: rope_parameters.rope_theta {old['rope_theta']} gave way to {rope.get('rope_theta')} of rope_scaling, "
                "as in transformers."
            )
    if not isinstance(rope, dict):
        return
    names = _NEOX if config.get("model_type") == "gpt_neox" else {}
    for key in _THETA:
        if rope.get(key) is not None:
            _set(config, names.get(key, key), rope[key], notes)
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = {key: value for key, value in rope.items() if key not in _THETA and value is not None}
    if kind != "default" or set(scaling) - {"rope_type", "type"}:  # mlx-lm's models look for either name
        _set(config, "rope_scaling", {**scaling, "rope_type": kind, "type": kind}, notes)


def _set(config: dict[str, Any], key: str, value: Any, notes: list[str]) -> None:
    old = config.get(key)
    config[key] = value
    if old is None:
        notes.append(f"config.json: {key} = {value}, taken from rope_parameters.")
    elif old != value and not isinstance(value, dict):
        notes.append(f"config.json: {key} was {old}; rope_parameters say {value}, which is what transformers uses.")


def _repair_family(config: dict[str, Any], notes: list[str]) -> None:
    kind = config.get("model_type")
    for key, fact in _FACTS.get(str(kind), {}).items():
        if config.get(key) is None:
            missing = key not in config
            try:
                config[key] = fact(config)
            except (KeyError, TypeError, ZeroDivisionError):
                continue  # too broken to derive anything from; whoever loads it says what is missing
            if missing and config[key] is not None:
                notes.append(f"config.json: {key} = {config[key]}, which {kind} fixes and mlx-lm asks for.")
    if kind in _PERIODIC and isinstance(config.get("layer_types"), list):
        period = _period(config["layer_types"])
        if kind == "exaone4":
            wanted: Any = "L" * (period - 1) + "G" if period and period > 1 else None
        else:
            wanted = period
        old = config.get("sliding_window_pattern")
        if (wanted is not None or kind == "exaone4") and ("sliding_window_pattern" not in config or old != wanted):
            config["sliding_window_pattern"] = wanted
            notes.append(f"config.json: sliding_window_pattern = {wanted}, taken from layer_types.")


def _period(layer_types: list[Any]) -> int | None:
    """p if exactly the layers p, 2p, ... (from 1) have full attention, else None."""
    full = [i for i, kind in enumerate(layer_types, 1) if kind == "full_attention"]
    if not full or full != list(range(full[0], len(layer_types) + 1, full[0])):
        return None
    return full[0]


def for_mlx(config: Mapping[str, Any], tokens: int = 0) -> tuple[dict[str, Any], list[str]]:
    """A repaired configuration as mlx-lm has to be given it for sequences of up to `tokens`, and notes.

    Raises ModelError for a family that mlx-lm computes otherwise than transformers.
    """
    kind = config.get("model_type")
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    for each in (kind, text.get("model_type")):
        if each in WRONG_ON_MLX:
            raise ModelError(f"model_type {each}: {WRONG_ON_MLX[each]}. Use --backend torch, or another model.")
    if kind in _PERIODIC and isinstance(config.get("layer_types"), list) and _period(config["layer_types"]) is None:
        raise ModelError(f"model_type {kind}: mlx-lm wants full attention in every n-th layer, and layer_types are otherwise. Use --backend torch.")
    decoded: dict[str, Any] = _floats(config)
    return short_rope(decoded, tokens)


def _floats(value: Any) -> Any:
    """transformers writes infinity and NaN as {"__float__": "Infinity"}, which mlx-lm expects decoded."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"}:
            return float(str(value["__float__"]))
        return {key: _floats(item) for key, item in value.items()}
    return [_floats(item) for item in value] if isinstance(value, list) else value


LONG_ROPE = "config.json: as train.max_length is above {limit}, texts of up to {limit} tokens get the long rotary factors too, not the short ones as in inference."


def _rope_of(config: Mapping[str, Any]) -> tuple[dict[str, Any], str, Any]:
    """The rotary embedding's parameters, its type, and `original_max_position_embeddings`, None if that is not said."""
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}, "default", None
    kind = str(rope.get("rope_type", rope.get("type")))
    return rope, "longrope" if kind == "su" else kind, config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")


def for_torch(config: Mapping[str, Any], tokens: int = 0) -> tuple[dict[str, Any], list[str]]:
    """A repaired configuration as transformers has to be given it for sequences of up to `tokens`, and notes.

    transformers chooses the factors of `longrope` (Phi-3) and `dynamic` by the longest sequence of a batch, so a text's log-probs would
    depend on what is computed beside it. Long factors throughout are what mlx-lm computes too. Raises ModelError for `dynamic`.
    """
    result = dict(config)
    _, kind, limit = _rope_of(config)
    limit = limit or config.get("max_position_embeddings")  # transformers' default
    if kind not in ("longrope", "dynamic") or limit is None or tokens <= limit:
        return result, []
    if kind == "dynamic":
        raise ModelError(f"its rotary embedding (dynamic) changes with the longest text beside another, beyond {limit} tokens. Set train.max_length: {limit}.")
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(result.get(key), dict) and "long_factor" in result[key]:
            result[key] = {**result[key], "short_factor": result[key]["long_factor"]}
    return result, [LONG_ROPE.format(limit=limit)]


def short_rope(config: dict[str, Any], tokens: int) -> tuple[dict[str, Any], list[str]]:
    """For mlx-lm, which always applies the long factors of `longrope` (Phi-3): a copy that is right for sequences of up to `tokens`.

    transformers uses the short factors up to `original_max_position_embeddings` tokens. Longer sequences keep the long ones, which mlx-lm
    then also applies to short sequences; the note says so.
    """
    rope, kind, limit = _rope_of(config)
    if kind != "longrope" or limit is None or "short_factor" not in rope or not config.get("rope_scaling"):
        return config, []
    if tokens > limit:
        return config, [LONG_ROPE.format(limit=limit)]
    return {**config, "rope_scaling": {**rope, "long_factor": rope["short_factor"]}}, []
