"""Prompts shared between completions on PyTorch: exact against padded rows in every family, or refused."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

import tiny_families  # noqa: E402
from torch_models import CPU, FAMILIES, VARIANTS, apart, forest, gradients, scored, tiny  # noqa: E402

import upo_torch  # noqa: E402
from upo.adapters import write_adapter  # noqa: E402
from upo.backend import Sampling  # noqa: E402
from upo.config import load_config  # noqa: E402
from upo.data.batch import Example, collate  # noqa: E402
from upo.data.forest import Forest, padded  # noqa: E402
from upo.data.packed import Tree, packed  # noqa: E402
from upo_torch import attention  # noqa: E402
from upo_torch.model import Model  # noqa: E402
from upo_torch.selfcheck import why_not_shared  # noqa: E402

EXACT = [*(kind for kind in FAMILIES if kind not in ("lfm2", "minimax", "llama4_text", "gpt2")), *(f"{kind}*" for kind in VARIANTS)]


def plainly(model: Model, forest: Forest) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The same as `gradients`, from the network's own logits: each completion alone after its prompt, log-softmax over all logits at once."""
    for parameter in model.policy.values():
        parameter.grad = None
    found = []
    for owner, completion in zip(forest.owner, forest.completions, strict=True):
        ids = torch.from_numpy(np.concatenate([forest.prompts[owner], completion]).astype(np.int64))
        logits = model.net(input_ids=ids[None], use_cache=False).logits[0, -len(completion) - 1 : -1]
        found.append(logits.float().log_softmax(-1).gather(1, ids[-len(completion) :, None]).sum())
    logp = torch.stack(found)
    (logp * torch.linspace(-1, 2, len(logp))).sum().backward()
    return logp.detach().numpy(), {name: p.grad.numpy().copy() for name, p in model.policy.items() if p.grad is not None}


@pytest.mark.parametrize("name", EXACT)
def test_family_is_exact(name):
    """Against the network's own logits, heads tied and not, soft caps and windows, 1 to 4 completions for a prompt.

    Float32 rounding of two layers: measured at most 5e-6 nats and 6e-6 of a gradient; the limits are those promised. Recomputation
    repeats the same operations in the same shapes, so it changes no bit.
    """
    model = tiny(name)
    own, own_slope = plainly(model, forest())
    assert np.abs(own).min() > 0.1
    shared, shared_slope = gradients(model, packed(forest()))
    for logps, slope in (gradients(model, padded(forest())), (shared, shared_slope)):
        np.testing.assert_allclose(logps, own, atol=1e-4, rtol=0)
        assert apart(own_slope, slope) < 1e-4
    if model.net.supports_gradient_checkpointing:
        again, again_slope = gradients(model, packed(forest()), recompute=True)
        np.testing.assert_array_equal(again, shared)
        assert apart(shared_slope, again_slope) == 0
    assert why_not_shared(model) is None


@pytest.mark.parametrize("part", [attention.PART, 7])
@pytest.mark.parametrize("counts", [(1,), (2,), (3, 3), (4, 1, 2), (0, 2), (0, 0)])
def test_any_number_of_completions(counts, part, monkeypatch):
    monkeypatch.setattr(attention, "PART", part)
    model = tiny("gemma3_text")  # a window of 8 in one layer, none in the other
    for longest in (4, 40):  # completions in one call, and each in one of its own
        trees = forest(counts, longest=longest)
        one, other = packed(trees), padded(trees)
        hidden, plain = model.hidden_of(one), model.hidden_of(other)
        for a, b in ((one.src, other.src), (one.value_src, other.value_src)):
            torch.testing.assert_close(hidden[torch.from_numpy(a)], plain[torch.from_numpy(b)], atol=1e-5, rtol=1e-5)


def test_variants_differ_from_their_families():
    """A cap or window that changed nothing would be no test."""
    for kind in VARIANTS:
        plain, variant = (scored(tiny(name), padded(forest())).detach().numpy() for name in (kind, f"{kind}*"))
        assert np.abs(plain - variant).max() > 1e-2, kind
    sinks = tiny("gpt_oss")
    before = scored(sinks, packed(forest())).detach().numpy()
    for layer in sinks.decoder.layers:
        layer.self_attn.sinks.data += 2
    assert np.abs(scored(sinks, packed(forest())).detach().numpy() - before).max() > 1e-2


# --- What is refused ------------------------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_ssm": 32, "mamba_n_groups": 1}
REFUSED = {
    "lfm2": ({}, "1 of the 2 layers"),  # convolutions
    "minimax": ({}, "1 of the 2 layers"),  # linear attention
    "mamba": ({**SMALL, "state_size": 8}, "does not run on shared prompts|0 of the 2 layers"),
    "bloom": ({**SMALL, "n_layer": 2, "n_head": 4}, "does not run on shared prompts|0 of the 2 layers"),  # positions as a bias on the scores
    "falcon_h1": ({**SMALL, **MAMBA, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}, "log-probs"),  # both in each layer
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_family_is_refused(kind):
    changes, reason = REFUSED[kind]
    model = tiny(kind, **changes)
    why = why_not_shared(model)
    assert re.search(reason, why or ""), why


def attended(**arguments):
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    plan = attention.plan((Tree(2, (1,)),), lambda q, k: k <= q, None, CPU)
    return attention.attend(torch.nn.Identity(), q, k, v, arguments.pop("attention_mask", plan), **arguments)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [({"position_bias": torch.zeros(1)}, "position_bias"), ({"dropout": 0.1}, "dropout"), ({"attention_mask": None}, "a mask of its own|mask of its own")],
)
def test_unknown_arguments_are_refused(arguments, reason):
    assert attended(sliding_window=4, use_cache=False)[0].shape == (1, 3, 4, 8)
    with pytest.raises(attention.Unshareable, match=reason):
        attended(**arguments)


@pytest.mark.parametrize(("what", "reason"), [("blocks", "log-probs"), ("positions", "log-probs"), ("branches", "does not run")])
def test_the_check_sees_a_fault(monkeypatch, what, reason):
    """Completions that see those before them; that go on from one another; a plan that does not fit the tokens."""
    model = tiny("llama")
    if what == "blocks":
        monkeypatch.setattr(attention, "_blocks", lambda tree, *_: [attention.Block(tree.tokens, tuple(range(1 + len(tree.completions))), None)])
    else:
        monkeypatch.setattr(Tree, what, lambda tree: np.arange(tree.tokens) * (what == "positions"))
    assert reason in (why_not_shared(model) or "")


def test_the_model_is_as_before(tiny_llama):
    """After a pass over shared prompts, one that failed too, the model attends as it did."""
    learner = load(tiny_llama)
    prompts = [np.arange(5, 25, dtype=np.int32), np.arange(7, 12, dtype=np.int32)]
    before = learner.generate(prompts, Sampling(max_tokens=8, temperature=0))
    config = learner.model.net.config
    assert (learner.info.layout, config._attn_implementation) == ("packed", "sdpa")
    layout = packed(forest())
    broken = replace(layout, positions=layout.positions[:, :-1])
    with pytest.raises(RuntimeError):
        learner.model.hidden_of(broken)
    assert config._attn_implementation == "sdpa"
    again = learner.generate(prompts, Sampling(max_tokens=8, temperature=0))
    assert [t.tolist() for t in before] == [t.tolist() for t in again]


# --- How it is computed ---------------------------------------------------------------------------------------------------------------


def test_blocks(monkeypatch):
    """Causal calls where they do, one call for short completions, one each for long ones and several for very long ones; a window puts a
    mask on the prompt."""
    causal = lambda q, k: k <= q  # noqa: E731

    def blocks(tree: Tree, window: int | None = None) -> list[tuple[int, tuple[int, ...], bool]]:
        sees = causal if window is None else (lambda q, k: (k <= q) & (k > q - window))
        ((segments, found),) = attention.plan((tree,), sees, window, CPU).trees
        assert segments == (tree.prompt, *tree.completions)
        return [(block.queries, block.keys, block.mask is not None) for block in found]

    assert blocks(Tree(5, ())) == [(5, (0,), False)]
    assert blocks(Tree(5, (4,))) == [(9, (0, 1), False)]
    assert blocks(Tree(30, (4, 3))) == [(30, (0,), False), (7, (0, 1, 2), True)]
    assert blocks(Tree(5, (40, 30))) == [(5, (0,), False), (40, (0, 1), True), (30, (0, 2), True)]
    assert blocks(Tree(5, (4,)), window=9) == [(9, (0, 1), False)], "the text is within the window"
    assert blocks(Tree(5, (4,)), window=3) == [(5, (0,), True), (4, (0, 1), True)]
    monkeypatch.setattr(attention, "PART", 16)
    assert blocks(Tree(5, (40, 3))) == [(5, (0,), False), (16, (0, 1), True), (16, (0, 1), True), (8, (0, 1), True), (3, (0, 2), True)]
    ((_, found),) = attention.plan((Tree(5, (40, 3)),), causal, None, CPU).trees
    assert [block.mask.shape[1] for block in found[1:]] == [21, 37, 45, 8], "no keys that come after the last query"


def segments_apart(q, k, v, ends_q, ends_k, most_q, most_k, scale, left, cap=None):
    """What both kernels document: segments one by one, key heads shared by neighbouring query heads, the last query beside the last key."""
    assert ends_q.dtype == ends_k.dtype == torch.int32 and most_q == int(ends_q.diff().max()) and most_k == int(ends_k.diff().max())
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    out = []
    for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
        keys, values = (x[c:d].transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (k, v))
        scores = scale * q[a:b].transpose(0, 1) @ keys.transpose(1, 2)
        scores = scores if not cap else cap * torch.tanh(scores / cap)
        distance = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        seen = (distance >= 0) & ((distance <= left) | (left < 0))
        out.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(out)


def torch_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """With the names of torch.nn.attention.varlen.varlen_attn."""
    assert enable_gqa and window_size[1] == 0
    return segments_apart(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size[0])


def older_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """torch 2.11's, which wants a key head for every query head."""
    assert query.shape[1] == key.shape[1] == value.shape[1] and window_size[1] == 0
    return segments_apart(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size[0])


def flash_kernel(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0
):
    """With the names of flash_attn.flash_attn_varlen_func, version 2.7."""
    assert causal and dropout_p == 0 and window_size[1] in (0, -1)
    return segments_apart(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window_size[0], softcap)


@pytest.mark.parametrize(("kernel", "cap"), [("torch", None), ("older", None), ("flash", None), ("flash", 0.7)])
@pytest.mark.parametrize("window", [None, 6])
def test_the_segments_of_the_kernels(monkeypatch, window, kernel, cap):
    """The kernels themselves need CUDA; here ones that do what their documentation says, on the segments and keys that they are given."""
    trees = packed(forest()).trees
    sees = (lambda q, k: k <= q) if window is None else (lambda q, k: (k <= q) & (k > q - window))
    blocks, tokens = attention.plan(trees, sees, window, CPU), sum(tree.tokens for tree in trees)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, 8, requires_grad=True) for heads in (4, 2, 2))
    up = torch.randn(1, tokens, 4, 8)
    expected, _ = attention.attend(torch.nn.Identity(), q, k, v, blocks, scaling=0.3, softcap=cap)
    slopes = torch.autograd.grad((expected * up).sum(), (q, k, v))
    monkeypatch.setattr(attention, "varlen_attn", older_kernel if kernel == "older" else torch_kernel)
    monkeypatch.setattr(attention, "_options", {"enable_gqa"} if kernel == "torch" else set())
    monkeypatch.setattr(attention, "flash_attn_varlen_func", flash_kernel)
    monkeypatch.setattr(attention, "_kernel", lambda *_: "flash" if kernel == "flash" else "torch")
    kind = "causal" if window is None else "window"
    whole = replace(blocks, varlen=attention._varlen(trees, kind, window, CPU))
    found, _ = attention.attend(torch.nn.Identity(), q, k, v, whole, scaling=0.3, softcap=cap)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    for a, b in zip(torch.autograd.grad((found * up).sum(), (q, k, v)), slopes, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert attention._varlen(trees, "other", window, CPU) is None


def test_which_kernel(monkeypatch):
    """torch's own where it can, flash-attn where it is installed and torch's cannot, else neither."""
    one, other, ability = object(), object(), [(8, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: ability[0])

    def chosen(own, flash, softcap=None, size=64, values=None, dtype=torch.bfloat16, planned=True):
        monkeypatch.setattr(attention, "varlen_attn", own)
        monkeypatch.setattr(attention, "flash_attn_varlen_func", flash)
        plan = attention.Plan(list, attention._varlen((Tree(2, (1,)),), "causal", None, CPU) if planned else None)
        return attention._kernel(plan, torch.zeros(1, 1, 3, size, dtype=dtype), torch.zeros(1, 1, 3, values or size, dtype=dtype), softcap)

    assert chosen(one, other) == chosen(one, None) == "torch"
    assert chosen(None, other) == chosen(one, other, softcap=5.0) == chosen(one, other, size=52) == "flash"
    assert chosen(None, None) == chosen(one, None, softcap=5.0) == ""
    for how in ({"dtype": torch.float32}, {"size": 512}, {"values": 32}, {"planned": False}):
        assert chosen(one, other, **how) == ""
    ability[0] = (7, 5)
    assert chosen(one, other) == ""


@pytest.mark.parametrize(("tree", "seen"), [(Tree(60, (150, 3)), torch.float32), (Tree(500, (300, 20)), torch.bfloat16), (Tree(300, (280,)), torch.bfloat16)])
def test_long_rows_stay_in_16_bits_on_a_cpu(monkeypatch, tree, seen):
    """Short ones are computed in float32, and either is as far from float32 as bfloat16 rounds (2^-9 of each number): value and gradient."""
    dtypes, fused = [], attention._fused

    def watched(query, key, value, mask, scale):
        dtypes.extend((query.dtype, key.dtype, value.dtype))
        return fused(query, key, value, mask, scale)

    monkeypatch.setattr(attention, "_fused", watched)
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, tree.tokens, 16).bfloat16() for heads in (4, 2, 2)]
    up = torch.randn(1, tree.tokens, 4, 16)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
        out, _ = attention.attend(torch.nn.Identity(), q, k, v, attention.plan((tree,), lambda q, k: k <= q, None, CPU))
        assert out.dtype == dtype
        found.append((out, *torch.autograd.grad((out.float() * up).sum(), (q, k, v))))
    half = len(dtypes) // 2
    assert set(dtypes[:half]) == {seen} and set(dtypes[half:]) == {torch.float32}
    for a, b in zip(*found, strict=True):
        assert (a.float() - b).norm() < 0.01 * b.norm()


def test_no_frozen_weight_is_cast():
    """In 16 bits only the adapter's masters are, once for each use in either pass; the head is multiplied as it is."""
    from torch.utils._python_dispatch import TorchDispatchMode

    model = tiny("llama", dtype=torch.bfloat16)
    masters = {p.untyped_storage().data_ptr() for p in model.policy.values()}
    frozen = {p.untyped_storage().data_ptr() for p in model.net.parameters() if not p.requires_grad}
    cast: list[bool] = []  # of a master or not

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "_to_copy" in str(function) and (at := args[0].untyped_storage().data_ptr()) in masters | frozen:
                cast.append(at in masters)
            return function(*args, **(kwargs or {}))

    with Casts():
        gradients(model, packed(forest()))
    assert cast and all(cast)


@pytest.mark.parametrize("recompute", [False, True])
def test_linear_layers_get_dense_inputs_in_bfloat16(recompute):
    """A product of strided bfloat16 inputs takes hundreds of times as long on a CPU, in either pass; a transposed one does not."""
    from torch.utils._python_dispatch import TorchDispatchMode

    model, dense = tiny("llama", dtype=torch.bfloat16), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
                dense.append(all(x.is_contiguous() or x.t().is_contiguous() for x in args if x.dtype == torch.bfloat16))
            return function(*args, **(kwargs or {}))

    with Watch():
        gradients(model, packed(forest()), recompute)
    assert all(dense) and len(dense) > 8 * 7  # 8 layers with an adapter, 3 products forward and 5 backward, fewer in the first


# --- The learner ----------------------------------------------------------------------------------------------------------------------

UPO = {"preset": "upo", "auxiliary": {"rewards": [{"scorer": "length"}]}}


def load(folder, objective: object = None, sharing: str = "auto", **sections):
    config = {
        "model": str(folder),
        "device": "cpu",
        "data": {"train": "none.jsonl"},
        "adapter": {"rank": 4, "alpha": 8, **sections.pop("adapter", {})},
        "objective": objective or {"preference": {"loss": "dpo"}},
        "optimizer": {"clip": 1e9},
        "train": {"prefix_sharing": sharing, **sections.pop("train", {})},
        **sections,
    }
    return upo_torch.load(load_config(config))


def rows(n: int = 5) -> list[Example]:
    rng = np.random.default_rng(0)
    tokens = lambda low, high: rng.integers(3, 384, rng.integers(low, high)).astype(np.int32)  # noqa: E731
    made = []
    for i in range(n):
        two = lambda: (tokens(2, 12), tokens(2, 12))  # noqa: E731
        reward = tuple(float(r) for r in rng.random(2))
        made.append(Example(f"t:{i + 1}", "pair", tokens(3, 20), two(), (1, -1), reward=reward, partners=two(), anchor=tokens(2, 9)))
    return made


def moved(learner) -> None:
    rng = np.random.default_rng(5)
    state = learner.state()
    for section in set(state) & {"adapter", "value_head"}:
        state[section] = {k: (a + 0.1 * rng.standard_normal(a.shape)).astype(np.float32) for k, a in state[section].items()}
    learner.load_state(state)


def one_step(learner, n: int = 5):
    """What a step finds out and the gradients it uses; the weights stay where they are."""
    moved(learner)
    batch = collate(rows(n))
    score = lambda forest, **how: learner.logps(forest, reference=0, **how)  # noqa: E731
    batch = replace(
        batch, ref_logp=score(batch.forest), ref_token_logp=score(batch.forest, tokens=True), partner_ref_logp=score(batch.partners), anchor_ref_logp=score(batch.anchors)
    )
    outcome = learner.step(batch, 0.0)
    grads = {name: p.grad.numpy().copy() for name, p in (*learner.model.policy.items(), *learner.head.items())}
    return batch, outcome, grads


OBJECTIVES = {
    "dpo": {"preference": {"loss": "dpo"}},
    "kto": {"preference": {"loss": "kto"}},
    "upo": UPO,
    "tokens": {"preference": {"loss": "ld_dpo"}},
    "anchors": {"preference": {"loss": "bapo"}},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_is_that_of_padded_rows(tiny_llama, name):
    found = [one_step(load(tiny_llama, OBJECTIVES[name], sharing)) for sharing in ("off", "auto")]
    (batch, plain, slope), (shared_batch, shared, shared_slope) = found
    for field in ("ref_logp", "ref_token_logp", "partner_ref_logp", "anchor_ref_logp"):
        np.testing.assert_allclose(getattr(shared_batch, field), getattr(batch, field), atol=1e-4)
    np.testing.assert_allclose(shared.logp, plain.logp, atol=1e-4)
    for key, vector in plain.others.items():
        np.testing.assert_allclose(shared.others[key], vector, atol=1e-4)
    assert apart(slope, shared_slope) < 1e-4
    if name == "upo":
        np.testing.assert_allclose(shared.value, plain.value, atol=1e-5)
        assert np.abs(slope["0.weight"]).max() > 1e-6


def test_prompt_states_and_references(tiny_llama, tmp_path):
    start = load(tiny_llama)
    moved(start)
    write_adapter(tmp_path / "start", start.state()["adapter"], start.adapter_config())
    plain, shared = (load(tiny_llama, sharing=how, adapter={"start": str(tmp_path / "start")}, reference="start") for how in ("off", "auto"))
    assert (plain.info.layout, shared.info.layout) == ("padded", "packed")
    assert not [note for note in shared.info.notes if note.startswith("train.prefix_sharing")]
    trees = forest()
    for learner in (plain, shared):
        np.testing.assert_array_equal(learner.logps(trees), learner.logps(trees, reference=0))
        moved(learner)
    for how in ({}, {"reference": 0}):
        np.testing.assert_allclose(shared.logps(trees, **how), plain.logps(trees, **how), atol=1e-4)
        np.testing.assert_allclose(shared.prompt_states(trees, **how), plain.prompt_states(trees, **how), atol=1e-5)
    assert np.abs(shared.logps(trees) - shared.logps(trees, reference=0)).min() > 1e-2


def test_fewer_tokens_are_computed(tiny_llama):
    learner, seen = load(tiny_llama, train={"micro_batch_tokens": 10_000}), []
    learner.model.decoder.embed_tokens.register_forward_pre_hook(lambda _, x: seen.append(x[0].numel()))
    batch, _, _ = one_step(learner)
    assert seen[-1] == packed(batch.scored).ids.size < padded(batch.scored).ids.size


def test_a_family_that_cannot_share_says_so(tmp_path):
    tiny_families.write("lfm2", FAMILIES["lfm2"], tmp_path)
    learner = load(tmp_path)
    assert learner.info.layout == "padded"
    (note,) = [note for note in learner.info.notes if "prefix_sharing" in note]
    assert note == "train.prefix_sharing: each completion is computed with a prompt of its own: with Lfm2ForCausalLM, 1 of the 2 layers look at other tokens through attention alone."
    assert not any("prefix_sharing" in note for note in load(tmp_path, sharing="off").info.notes)
