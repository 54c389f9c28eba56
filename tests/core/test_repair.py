"""What transformers nests and mlx-lm reads flat: the configuration in both spellings. Logits are compared in tests/backends."""

from __future__ import annotations

import json
from typing import Any

import pytest

from upo.errors import ModelError
from upo.repair import for_mlx, repair_config, short_rope


def test_new_rope_spelling_gets_the_old_one() -> None:
    config, notes = repair_config(
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default", "partial_rotary_factor": 0.5}}
    )
    assert (config["rope_theta"], config["partial_rotary_factor"]) == (5e5, 0.5)
    assert "rope_scaling" not in config and len(notes) == 2


def test_old_rope_spelling_gets_the_new_one() -> None:
    config, notes = repair_config(
        {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.25}
    )
    assert config["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    assert (
        config["rope_scaling"] == {"type": "linear", "rope_type": "linear", "factor": 2.0}
        and config["rope_theta"] == 1e6
        and notes == []
    )


def test_scaling_is_carried_over() -> None:
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config, _ = repair_config({"rope_parameters": {**llama3, "rope_theta": 5e5}})
    assert config["rope_scaling"] == {**llama3, "type": "llama3"} and config["rope_theta"] == 5e5


def test_a_conflict_is_settled_as_in_transformers_and_noted() -> None:
    config, notes = repair_config({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
    assert config["rope_theta"] == 5e5 and notes == [
        "config.json: rope_theta was 10000.0; rope_parameters say 500000.0, which is what transformers uses."
    ]
    config, notes = repair_config(
        {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 7.0}, "rope_parameters": {"rope_theta": 5.0}}
    )
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 7.0 and "gave way" in notes[0]


def test_rope_per_kind_of_layer() -> None:
    rope = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    config, _ = repair_config({"rope_parameters": rope})
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)
    assert config["rope_scaling"]["factor"] == 8.0 and config["rope_parameters"] == rope


def test_experts_nested_and_neox() -> None:
    assert repair_config({"num_local_experts": 8})[0]["num_experts"] == 8
    assert repair_config({"num_experts": 8})[0]["num_local_experts"] == 8
    config, notes = repair_config({"text_config": {"rope_parameters": {"rope_theta": 3.0}}})
    assert config["text_config"]["rope_theta"] == 3.0 and notes[0].startswith("config.json, text_config: rope_theta")
    neox, _ = repair_config(
        {"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 3.0, "partial_rotary_factor": 0.25}}
    )
    assert (neox["rotary_emb_base"], neox["rotary_pct"]) == (3.0, 0.25)


def test_repair_is_idempotent_and_leaves_its_input_alone() -> None:
    before = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "yarn", "factor": 4.0}, "num_experts": 4}
    copy = json.loads(json.dumps(before))
    once, notes = repair_config(before)
    assert before == copy and notes
    assert repair_config(once) == (once, [])
    assert repair_config({"hidden_size": 8}) == ({"hidden_size": 8}, [])


def test_longrope_for_short_sequences() -> None:
    config = {
        "original_max_position_embeddings": 64,
        "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
    }
    assert short_rope(config, 64)[0]["rope_scaling"]["long_factor"] == [1.0]
    same, notes = short_rope(config, 65)
    assert same == config and "64 tokens" in notes[0]
    assert short_rope({"rope_theta": 1e4}, 10) == ({"rope_theta": 1e4}, [])


@pytest.mark.parametrize(
    ("kind", "layers", "wanted"),
    [
        ("cohere2", "sssf", 4),
        ("cohere2", "sf", 2),
        ("gemma3_text", "sssssfss", 6),
        ("gemma3_text", "ff", 1),
        ("exaone4", "sssf", "LLLG"),
        ("exaone4", "ff", None),
    ],
)
def test_layer_types_as_a_period(kind: str, layers: str, wanted: Any) -> None:
    kinds = [{"s": "sliding_attention", "f": "full_attention"}[letter] for letter in layers]
    given = {"model_type": kind, "layer_types": kinds, "hidden_size": 32, "num_attention_heads": 4, "sliding_window_pattern": 3}
    config, notes = repair_config(given)
    assert config["sliding_window_pattern"] == wanted and any(f"sliding_window_pattern = {wanted}, taken from layer_types" in n for n in notes)
    assert repair_config(config) == (config, [])
    assert for_mlx(config)[0] == config


@pytest.mark.parametrize("layers", [["full_attention", "sliding_attention"], ["sliding_attention"] * 2])
def test_layer_types_without_a_period_are_refused_for_mlx_only(layers: list[str]) -> None:
    config, _ = repair_config({"model_type": "cohere2", "layer_types": layers, "sliding_window_pattern": 4})
    assert config["sliding_window_pattern"] == 4
    with pytest.raises(ModelError, match=r"every n-th layer.*--backend torch"):
        for_mlx(config)


def test_what_a_class_fixes_is_spelled_out() -> None:
    config, notes = repair_config({"model_type": "apertus", "qk_norm": False})
    assert (config["mlp_bias"], config["post_norm"], config["qk_norm"]) == (False, False, False) and len(notes) == 2
    config, _ = repair_config({"model_type": "exaone4", "hidden_size": 64, "num_attention_heads": 4})
    assert config["head_dim"] == 16 and config["rope_scaling"] is None
    assert repair_config({"model_type": "exaone4"})[0]["rope_scaling"] is None  # nothing to derive a head size from: left to the loader
    assert repair_config({"model_type": "glm4_moe"})[0]["rope_scaling"] is None
    assert repair_config({"model_type": "lfm2", "hidden_size": 64})[0]["block_dim"] == 64


@pytest.mark.parametrize("config", [{"model_type": "olmo"}, {"model_type": "x", "text_config": {"model_type": "ernie4_5_moe"}}])
def test_families_that_mlx_lm_computes_otherwise_are_refused_by_name(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"model_type (olmo|ernie4_5_moe): .* Use --backend torch"):
        for_mlx(config)


def test_floats_that_json_lacks_are_decoded_for_mlx() -> None:
    config, _ = for_mlx({"time_step_limit": [0.0, {"__float__": "Infinity"}], "x": {"__float__": "-Infinity"}, "rope_scaling": {"factor": 2}})
    assert config == {"time_step_limit": [0.0, float("inf")], "x": float("-inf"), "rope_scaling": {"factor": 2}}
