"""Prompts shared by their completions on MLX: the numbers and gradients of padded rows, or padded rows and a reason."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

from learner_runs import UPO, examples, shake, with_reference  # noqa: E402
from mlx.utils import tree_map  # noqa: E402
from mlx_runs import gradient, make_learner  # noqa: E402

from upo.config import TrainConfig  # noqa: E402
from upo.data.batch import Example, collate  # noqa: E402
from upo.data.forest import Forest, padded  # noqa: E402
from upo.targets import expand_targets, fresh_arrays  # noqa: E402
from upo_mlx import recompute, shared  # noqa: E402
from upo_mlx.device import MlxComm  # noqa: E402
from upo_mlx.logps import token_logps  # noqa: E402
from upo_mlx.model import LoRA, Model  # noqa: E402
from upo_mlx.ops import ops  # noqa: E402
from upo_mlx.selfcheck import choose_rows as choose_rows_of_ranks  # noqa: E402
from upo_mlx.shared import PaddedRows, Rows, SharedPrompts  # noqa: E402
from upo_mlx.state import import_arrays  # noqa: E402

VOCAB, SCALE = 90, 0.5
COMMON: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "rms_norm_eps": 1e-5, "layer_norm_eps": 1e-5, "vocab_size": VOCAB, "max_position_embeddings": 64, "rope_theta": 1e4, "tie_word_embeddings": True,
}  # fmt: skip
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}  # shorter than every prompt but one
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}

# By module of mlx-lm: options, and the axes of the family's attention scores.
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "llama": ({}, 4),
    "llama untied": ({"tie_word_embeddings": False}, 4),
    "llama sliding": (SLIDING, 4),
    "qwen2": ({}, 4),
    "qwen3": ({}, 4),
    "gemma2": ({"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}, 5),  # both soft caps bite
    "gemma3_text": ({"query_pre_attn_scalar": 8, "sliding_window": 4, "sliding_window_pattern": 2}, 4),
    "cohere2": ({"sliding_window": 4, "sliding_window_pattern": 2}, 4),  # layers without positions
    "olmo2": ({}, 4),
    "olmo3": (SLIDING, 4),
    "granite": ({"logits_scaling": 2.0, "attention_multiplier": 0.25, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
                 "attention_bias": False, "mlp_bias": False}, 4),
    "phi3": ({}, 4),
    "smollm3": ({"no_rope_layers": [1, 0]}, 4),
    # queries scaled by their position, from position 8 on
    "ministral3": ({"rope_parameters": {"type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 8}}, 4),
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2, **SLIDING}, 4),  # attention sinks
    "qwen3_moe": ({**EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": []}, 4),
    "deepseek_v3": ({**ROUTED, **MLA, "n_shared_experts": 1, "routed_scaling_factor": 1.0, "rope_scaling": None}, 4),  # keys and values of different widths
}  # fmt: skip


def build(family: str, **changes: Any) -> tuple[Model, LoRA]:
    """A small random model with an adapter that matters."""
    kind = family.split()[0]
    arch = importlib.import_module(f"mlx_lm.models.{kind}")
    options = {**COMMON, "model_type": kind, **FAMILIES.get(family, ({}, 4))[0], **changes}
    net = arch.Model(arch.ModelArgs.from_dict(options))
    rng = np.random.default_rng(0)
    net.update(tree_map(lambda a: a + 0.15 * mx.array(rng.standard_normal(a.shape).astype(np.float32)), net.parameters()))
    net.freeze()
    net.eval()
    model = Model(net)
    paths = expand_targets(model.dims(), "all-linear")
    model.add_loras(paths)
    model.check()
    shapes = import_arrays(fresh_arrays(model.dims(), paths, 2, 0))
    return model, LoRA({k: mx.array((0.2 * rng.standard_normal(a.shape)).astype(np.float32)) for k, a in shapes.items()}, SCALE)


def choose_rows(model: Model, policy: LoRA, train: TrainConfig) -> tuple[Rows, list[str]]:
    return choose_rows_of_ranks(model, policy, train, "float32", MlxComm())


def forest(completions: tuple[int, ...] = (1, 2, 3, 4), seed: int = 0) -> Forest:
    """A prompt for each number of completions, all in mixed order."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(3, VOCAB, rng.integers(low, high)).astype(np.int32)  # noqa: E731
    owner = rng.permutation(np.repeat(np.arange(len(completions)), completions))
    return Forest(tuple(draw(2, 15) for _ in completions), tuple(draw(1, 15) for _ in owner), owner)


def scored(model: Model, policy: LoRA, rows: Rows, given: Forest, recompute: bool) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Log-prob of each completion, and the adapter's gradient of a sum of them with signs."""
    layout, n = rows.lay(given), len(given.completions)
    signs = mx.array(np.where(np.arange(n) % 3 == 0, -1.0, 1.0).astype(np.float32))

    def loss(arrays: dict[str, Any]) -> Any:
        with model.using(LoRA(arrays, SCALE)), model.recomputing(recompute):
            tokens = token_logps(model.head, rows.hidden(model, layout)[mx.array(layout.src)], mx.array(layout.tgt))
        sums = ops.segment_sum(tokens, mx.array(layout.own), n)
        return mx.sum(sums * signs), sums

    (_, sums), grads = mx.value_and_grad(loss)(dict(policy.arrays))
    return np.array(sums), {name: np.array(g) for name, g in grads.items()}


def assert_equal(got: tuple[np.ndarray, dict[str, np.ndarray]], expected: tuple[np.ndarray, dict[str, np.ndarray]], where: Any) -> None:
    """To 1e-4 nats per completion and 1e-4 of each array's largest gradient; float32 rounding was measured at 2e-5 and 4e-6."""
    assert np.abs(got[0] - expected[0]).max() <= 1e-4, where
    for name, grad in expected[1].items():
        largest = np.abs(grad).max()
        assert largest > 1e-6, (where, name)  # a gradient of nothing would compare equal
        assert np.abs(got[1][name] - grad).max() <= 1e-4 * largest, (where, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_exact_with_shared_prompts(family):
    model, policy = build(family)
    rows, notes = choose_rows(model, policy, TrainConfig(max_length=64, gradient_checkpointing=True))
    assert notes == [] and isinstance(rows, SharedPrompts) and rows.axes == FAMILIES[family][1]
    given = forest()
    expected = scored(model, policy, PaddedRows(), given, recompute=False)
    for recompute_layers in (False, True):
        assert_equal(scored(model, policy, rows, given, recompute_layers), expected, (family, recompute_layers))


@pytest.mark.parametrize("completions", [(1,), (4,), (1, 1, 1), (0, 2, 0), (2, 2, 2, 2, 2)])
def test_any_number_of_completions(completions):
    model, policy = build("llama sliding")
    for seed in range(3):
        given = forest(completions, seed)
        expected = scored(model, policy, PaddedRows(), given, recompute=False)
        assert_equal(scored(model, policy, SharedPrompts(), given, recompute=True), expected, seed)


def test_against_rows_computed_one_by_one():
    model, policy = build("gemma3_text")
    given = forest()
    got, _ = scored(model, policy, SharedPrompts(), given, recompute=False)
    for i, completion in enumerate(given.completions):
        prompt = given.prompts[given.owner[i]]
        ids = mx.array(np.concatenate([prompt, completion]))
        with model.using(policy):
            logits = model.net(ids[None])[0]
        logps = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True), np.float64)
        assert got[i] == pytest.approx(sum(logps[len(prompt) - 1 + t, token] for t, token in enumerate(completion)), abs=1e-4)


def test_prompts_of_single_tokens_and_completions_of_single_tokens():
    model, policy = build("llama")
    one = lambda t: np.array([t], np.int32)  # noqa: E731
    for completions in ((one(5), one(6), one(7)), (one(5), np.array([6, 7], np.int32), one(8))):
        given = Forest((one(3), one(4)), completions, np.array([1, 0, 1]))
        expected = scored(model, policy, PaddedRows(), given, recompute=False)
        for recompute_layers in (False, True):
            got = scored(model, policy, SharedPrompts(), given, recompute_layers)
            assert np.abs(got[0] - expected[0]).max() <= 1e-4
            assert max(np.abs(got[1][k] - g).max() for k, g in expected[1].items()) <= 1e-4 * max(np.abs(g).max() for g in expected[1].values())


# --- The learner ------------------------------------------------------------------------------------------------------------------

TOKENS = {"preference": [{"loss": "ld_dpo"}, {"loss": "wpo"}, {"loss": "bapo"}]}  # log-probs of tokens, statistics of the vocabulary, anchors


def rows_with_anchors() -> list[Example]:
    rng = np.random.default_rng(3)
    return [replace(row, partners=None, anchor=rng.integers(3, 300, rng.integers(1, 9)).astype(np.int32)) for row in examples()]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("objective", ["dpo", "kto", UPO, TOKENS], ids=["dpo", "kto", "upo", "tokens"])
def test_a_step_is_the_same_in_both_layouts(tiny_llama_tied, objective, checkpointing):
    """Partners, value head, token log-probs, collisions and anchors included; references scored in the layout of the policy."""
    found = {}
    for sharing in ("off", "auto"):
        learner = make_learner(tiny_llama_tied, objective, train={"prefix_sharing": sharing, "gradient_checkpointing": checkpointing, "micro_batch_tokens": 80})
        assert learner.info.layout == {"off": "padded", "auto": "two_phase"}[sharing]
        shake(learner)
        if objective is TOKENS:
            batch = collate(rows_with_anchors())
            batch = replace(
                batch,
                ref_logp=learner.logps(batch.forest, reference=0),
                ref_token_logp=learner.logps(batch.forest, reference=0, tokens=True),
                anchor_ref_logp=learner.logps(batch.anchors, reference=0),
            )
        else:
            batch = with_reference(learner, examples())
            batch = replace(batch, partners=None, partner_ref_logp=None) if objective == "dpo" else batch
        grads, outcome = gradient(learner, batch, 80)
        again = learner.score(batch)
        vectors = {"logp": outcome.logp, "ref": batch.ref_logp, "score": again.logp, "states": learner.prompt_states(batch.forest), **outcome.others}
        vectors |= {name: getattr(outcome, name) for name in ("value", "partner_logp") if getattr(outcome, name) is not None}
        vectors |= {"anchor_ref": batch.anchor_ref_logp} if objective is TOKENS else {}
        found[sharing] = grads, vectors
    (plain, numbers), (shared_grads, others) = found["off"], found["auto"]
    assert numbers.keys() == others.keys() and plain.keys() == shared_grads.keys()
    assert objective is not TOKENS or {"token_logp", "collision", "anchor_logp"} <= numbers.keys()
    for name, vector in numbers.items():
        np.testing.assert_allclose(others[name], vector, rtol=0, atol=1e-4, err_msg=name)
    for name, grad in plain.items():
        assert np.abs(shared_grads[name] - grad).max() <= 1e-4 * max(np.abs(grad).max(), 1e-3), name
    assert max(np.abs(g).max() for g in plain.values()) > 1e-3


def test_fewer_token_slots_are_computed(tiny_llama):
    """What sharing is for: the decoder sees each prompt once."""
    learner = make_learner(tiny_llama, "dpo")
    row = Example("t:1", "pair", np.arange(3, 43, dtype=np.int32), (np.arange(4, 14, dtype=np.int32), np.arange(7, 15, dtype=np.int32)), (1, -1))
    batch, seen = collate([row]), []
    own = learner.model.hidden

    def counting(ids, cache=None):
        seen.append(ids.size)
        return own(ids, cache)

    learner.model.hidden = counting
    learner.logps(batch.forest)
    assert seen == [40, 2 * 9] and padded(batch.forest).ids.size == 100


# --- The self-check ---------------------------------------------------------------------------------------------------------------


def test_off_is_padded_without_a_note():
    model, policy = build("llama")
    rows, notes = choose_rows(model, policy, TrainConfig(prefix_sharing="off"))
    assert rows.name == "padded" and notes == []


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("lfm2", {"norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "block_dim": 32, "block_ff_dim": 48, "block_multiple_of": 8,
                  "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False, "full_attn_idxs": [1]}, "its layers keep ArraysCache"),
        ("mamba2", {"num_heads": 4, "head_dim": 16, "state_size": 8, "conv_kernel": 4, "n_groups": 1, "expand": 2, "use_conv_bias": True, "use_bias": False,
                    "residual_in_fp32": False, "time_step_rank": 4, "time_step_limit": (0.0, 1.0), "layer_norm_epsilon": 1e-5}, "its layers keep ArraysCache"),
        ("gemma4_text", {"num_kv_shared_layers": 1, "global_head_dim": 16, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8,
                         "sliding_window": 8, "sliding_window_pattern": 1, "use_double_wide_mlp": False}, "2 layers have 1 caches"),
    ],
    ids=["convolution", "state space", "keys of another layer"],
)  # fmt: skip
def test_families_that_fall_back(family, changes, reason):
    model, policy = build(family, **changes)
    rows, notes = choose_rows(model, policy, TrainConfig())
    assert rows.name == "padded"
    assert len(notes) == 1 and notes[0].startswith("train.prefix_sharing: ") and family in notes[0] and reason in notes[0]


def test_a_wrong_position_is_found(monkeypatch):
    def without_offset(self, arrays, ground):
        self.arrays, self.ground, self.offset = arrays, ground, mx.zeros_like(ground.offset)

    monkeypatch.setattr(shared.CompletionCache, "__init__", without_offset)
    rows, notes = choose_rows(*build("llama"), TrainConfig())
    assert rows.name == "padded" and "log-probs that differ by" in notes[0]


def test_a_token_that_sees_what_follows_is_found(monkeypatch):
    own = shared.Ground.mask
    monkeypatch.setattr(shared.Ground, "mask", lambda self, window: own(replace(self, offset=self.offset + 1), window))
    rows, notes = choose_rows(*build("llama"), TrainConfig())
    assert rows.name == "padded" and "log-probs that differ by" in notes[0]


def test_prompts_of_another_completion_are_found(monkeypatch):
    own = shared.Ground.join
    monkeypatch.setattr(shared.Ground, "join", lambda self, prompts, completions: own(self, mx.roll(prompts, 1, axis=0), completions))
    rows, notes = choose_rows(*build("llama"), TrainConfig())
    assert rows.name == "padded" and "log-probs that differ by" in notes[0]


def test_a_gradient_lost_in_recomputation_is_found(monkeypatch):
    """The trap of `mx.checkpoint`: the same values, and no gradient through what a function captures."""
    monkeypatch.setattr(recompute, "_arrays", lambda v: [v] if isinstance(v, mx.array) and mx.issubdtype(v.dtype, mx.floating) else [])
    monkeypatch.setattr(recompute, "_with_arrays", lambda v, arrays: arrays[0] if arrays else v)
    model, policy = build("llama")
    rows, notes = choose_rows(model, policy, TrainConfig(gradient_checkpointing=True))
    assert rows.name == "padded" and "gradients that differ by" in notes[0]
    assert choose_rows(model, policy, TrainConfig())[0].name == "two_phase"


@pytest.mark.parametrize(("asks", "reason"), [((), "attention masks of its own"), ((None,), "a window of 20 tokens in a way of its own")])
def test_masks_that_are_not_asked_for(monkeypatch, asks, reason):
    """A model that asks for no mask, or not for the window its caches have, is not trusted with rows longer than the probe's."""
    model, policy = build("olmo3", sliding_window=20)
    long, short = TrainConfig(max_length=64), TrainConfig(max_length=20)
    assert choose_rows(model, policy, long)[0].name == "two_phase"
    own = shared.CompletionCache.make_mask

    def make_mask(self, N, return_array=False, window_size=None):
        mask = own(self, N, return_array, window_size)
        self.ground.shared.asked.intersection_update(asks)
        return mask

    monkeypatch.setattr(shared.CompletionCache, "make_mask", make_mask)
    rows, notes = choose_rows(model, policy, long)
    assert rows.name == "padded" and reason in notes[0]
    assert choose_rows(model, policy, short)[0].name == ("two_phase" if asks else "padded")


def test_ranks_agree():
    """One rank that cannot share makes all of them fall back."""

    class Two:
        rank, size = 0, 2

        def all_sum(self, array):
            return array + 1

    rows, notes = choose_rows_of_ranks(*build("llama"), TrainConfig(), "float32", Two())
    assert rows.name == "padded" and "another rank" in notes[0]


def test_a_model_without_a_note_runs_in_two_phases(tiny_llama):
    learner = make_learner(tiny_llama, "dpo")
    assert learner.info.layout == "two_phase" and not any("prefix_sharing" in note for note in learner.info.notes)
