"""Loading, targets, LoRA layers, families and generation of the MLX backend."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

import mlx.nn as nn  # noqa: E402
from interpreters import mlx_lm_is_old  # noqa: E402

import upo_mlx  # noqa: E402
from upo import random, tensors  # noqa: E402
from upo.backend import Sampling  # noqa: E402
from upo.config import load_config  # noqa: E402
from upo.data.batch import Example, collate  # noqa: E402
from upo.data.forest import Forest  # noqa: E402
from upo.errors import BackendError, ModelError  # noqa: E402
from upo.sampling import pick  # noqa: E402
from upo.targets import expand_targets, fresh_arrays  # noqa: E402
from upo_mlx import device  # noqa: E402
from upo_mlx.logps import token_logps  # noqa: E402
from upo_mlx.model import LoRA, LoRALinear, Model, load_base  # noqa: E402
from upo_mlx.state import import_arrays  # noqa: E402


def load(folder, **sections):
    adapter = {"rank": 4, "alpha": 8, **sections.pop("adapter", {})}
    return upo_mlx.load(load_config({"model": str(folder), "data": {"train": "none.jsonl"}, "adapter": adapter, **sections}))


def forest(seed: int = 0) -> Forest:
    rng = np.random.default_rng(seed)
    tokens = lambda n: rng.integers(3, 384, n).astype(np.int32)  # noqa: E731
    return Forest((tokens(7), tokens(3), tokens(12)), tuple(tokens(n) for n in (5, 1, 9, 4)), np.array([0, 2, 0, 1]))


def one_by_one(learner, forest: Forest) -> list[float]:
    """Log-probs from the network's own logits, each completion alone."""
    out = []
    for p, c in zip(forest.owner, forest.completions, strict=True):
        ids = np.concatenate([forest.prompts[p], c])
        logits = np.array(learner.model.net(mx.array(ids)[None])[0]).astype(np.float64)[len(forest.prompts[p]) - 1 : -1]
        out.append((logits[np.arange(len(c)), c] - np.log(np.exp(logits).sum(-1))).sum())
    return out


@pytest.mark.parametrize("tied", [False, True])
def test_logps_equal_unbatched_scoring(make_tiny_llama, tied):
    learner = load(make_tiny_llama(tied=tied))
    np.testing.assert_allclose(learner.logps(forest()), one_by_one(learner, forest()), atol=3e-5)


def test_initial_adapter_is_seeded_by_name(tiny_llama):
    learner = load(tiny_llama, train={"seed": 7})
    adapter = learner.state()["adapter"]
    assert len(adapter) == 2 * 7 * 2
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    np.testing.assert_array_equal(adapter[name], random.lora_a(4, 128, 7, name))
    assert all((a == 0).all() == ("lora_B" in n) for n, a in adapter.items())
    assert learner.info.parameters == sum(np.prod(a.shape) for a in _tensors(tiny_llama).values())
    assert learner.info.trainable == sum(a.size for a in adapter.values())


def _tensors(folder) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(str(folder / "model.safetensors"))


def test_targets(tiny_llama):
    assert load(tiny_llama, adapter={"targets": ["v_proj", "self_attn.q_proj"]}).info.targets == ("q_proj", "v_proj")
    assert len(load(tiny_llama, adapter={"targets": "model.layers.1.mlp.up_proj"}).state()["adapter"]) == 2
    with pytest.raises(ModelError, match=r"called w_pack, z_proj\. There are: down_proj, .*v_proj\."):
        load(tiny_llama, adapter={"targets": ["q_proj", "z_proj", "w_pack"]})
    with pytest.raises(ModelError, match="lm_head"):
        load(tiny_llama, adapter={"targets": ["lm_head"]})


def test_rope_of_transformers_5_is_read(make_tiny_llama):
    folder = make_tiny_llama()
    with_both = load(folder).logps(forest())
    config = json.loads((folder / "config.json").read_text())
    del config["rope_theta"]  # as transformers >= 5 writes it; mlx-lm alone would take 10000
    (folder / "config.json").write_text(json.dumps(config))
    learner = load(folder)
    np.testing.assert_array_equal(learner.logps(forest()), with_both)
    assert any("rope_theta" in note for note in learner.info.notes)


def test_bfloat16_base_keeps_float32_masters(tiny_llama):
    with mx.stream(mx.cpu):
        learner = load(tiny_llama, dtype="bfloat16", device="cpu")
        assert learner.info.dtype == "bfloat16"
        x = mx.ones((1, 64), mx.bfloat16)
        layer = LoRALinear(nn.Linear(64, 8))
        layer.linear.set_dtype(mx.bfloat16)
        layer.lora_a, layer.lora_b, layer.scale = mx.full((64, 2), 0.01), mx.full((2, 8), 0.5), 2.0
        assert layer(x).dtype == mx.bfloat16
        assert (layer(x) - layer.linear(x)).astype(mx.float32).mean().item() == pytest.approx(2 * 0.64, rel=0.02)
        np.testing.assert_allclose(learner.logps(forest()), load(tiny_llama).logps(forest()), atol=1.0)
    if sys.platform == "linux":
        assert any("30 times slower" in note for note in learner.info.notes)


def test_quantised_base_trains(tiny_llama, tmp_path):
    from mlx.utils import tree_flatten

    folder = tmp_path / "q4"
    shutil.copytree(tiny_llama, folder)
    net, _ = load_base(folder, mx.float32)
    nn.quantize(net, group_size=32, bits=4)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(net.parameters())), {"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization": {"group_size": 32, "bits": 4}}))

    learner = load(folder, objective={"preference": {"loss": "sft"}}, train={"gradient_checkpointing": True})
    assert isinstance(learner.model.loras["model.layers.0.mlp.up_proj"].linear, nn.QuantizedLinear)
    assert learner.state()["adapter"]["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].shape == (4, 128)
    np.testing.assert_allclose(learner.logps(forest()), one_by_one(learner, forest()), atol=3e-5)
    whole = load(tiny_llama)
    assert learner.info.parameters == whole.info.parameters
    assert 1e-2 < np.abs(learner.logps(forest()) - whole.logps(forest())).max() < 20
    rows = [Example(f"t:{i}", "unpaired", forest(i).prompts[0], (forest(i).completions[0],), (1,)) for i in range(3)]
    start = learner.step(collate(rows), 1e-2).logp.sum()
    for _ in range(8):
        last = learner.step(collate(rows), 1e-2).logp.sum()
    assert last > start + 5


FAMILY = {
    "hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "rms_norm_eps": 1e-5, "vocab_size": 90, "max_position_embeddings": 64, "rope_theta": 1e4, "tie_word_embeddings": True,
}  # fmt: skip
FAMILIES = {
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 8},  # soft-capped logits
    "granite": {"logits_scaling": 2.0, "attention_multiplier": 0.25, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
                "attention_bias": False, "mlp_bias": False},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 16,
                  "norm_topk_prob": True},
    # the second half of the layers takes keys and values of the first: they must be arguments of the recomputation
    "gemma4_text": {"num_kv_shared_layers": 2, "global_head_dim": 16, "vocab_size_per_layer_input": 90, "hidden_size_per_layer_input": 8,
                    "sliding_window": 8, "sliding_window_pattern": 2, "use_double_wide_mlp": False},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families_head_and_recomputation(family):
    if family == "qwen3_moe" and mlx_lm_is_old():
        pytest.skip("docs/models.md: its router has no gradient before mlx-lm 0.32")
    arch = importlib.import_module(f"mlx_lm.models.{family}")
    mx.random.seed(0)
    model = Model(arch.Model(arch.ModelArgs.from_dict({**FAMILY, "model_type": family, **FAMILIES[family]})))
    paths = expand_targets(model.dims(), "all-linear")
    model.add_loras(paths)
    model.check()
    rng = np.random.default_rng(0)
    arrays = {k: mx.array((0.2 * rng.standard_normal(a.shape)).astype(np.float32)) for k, a in import_arrays(fresh_arrays(model.dims(), paths, 2, 0)).items()}
    ids, targets = mx.array(rng.integers(0, 90, (2, 12))), mx.array(rng.integers(0, 90, 24))

    def plain(arrays):
        with model.using(LoRA(arrays, 0.5)):
            logits = model.net(ids).reshape(24, -1)
        return mx.sum(mx.take_along_axis(logits, targets[:, None], -1)[:, 0] - mx.logsumexp(logits, -1))

    def ours(arrays):
        with model.using(LoRA(arrays, 0.5)):
            return mx.sum(token_logps(model.head, model.hidden(ids).reshape(24, -1), targets))

    expected, exact = mx.value_and_grad(plain)(arrays)
    got, grads = mx.value_and_grad(ours)(arrays)
    with model.recomputing():
        again, regrads = mx.value_and_grad(ours)(arrays)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5) and again.item() == pytest.approx(got.item(), rel=1e-6)
    scale = max(np.abs(np.array(g)).max() for g in exact.values())
    for name, g in exact.items():
        assert np.abs(np.array(g)).max() > 1e-6 * scale, name  # a layer that gets no gradient would compare equal
        np.testing.assert_allclose(np.array(grads[name]), np.array(g), atol=1e-5 * scale, err_msg=name)
        np.testing.assert_allclose(np.array(regrads[name]), np.array(grads[name]), atol=1e-6 * scale, err_msg=name)


def test_a_head_that_is_not_the_networks_is_refused(tiny_llama):
    net, _ = load_base(tiny_llama, mx.float32)
    own = type(net).__call__

    class Other(type(net)):
        def __call__(self, ids, *args):
            return own(self, ids, *args) * (2 if ids.ndim == 2 else 1)

    net.__class__ = Other
    with pytest.raises(ModelError, match=r"self-check failed.*--backend torch"):
        Model(net).check()


# --- Generation -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talker(tiny_llama):
    learner = load(tiny_llama)
    rng = np.random.default_rng(3)
    state = learner.state()
    state["adapter"] = {k: (a + 0.2 * rng.standard_normal(a.shape)).astype(np.float32) for k, a in state["adapter"].items()}
    learner.load_state(state)
    return learner


def test_greedy_in_batches_equals_greedy_alone(talker):
    prompts = [np.random.default_rng(i).integers(3, 384, n).astype(np.int32) for i, n in enumerate((5, 11, 2, 5, 8))]
    greedy = Sampling(max_tokens=12, temperature=0, batch_size=3)
    stops = talker._stops = (0, 2)
    batched = talker.generate(prompts, greedy)
    for prompt, tokens in zip(prompts, batched, strict=True):
        ids = list(prompt)
        with talker.model.using(talker.policy):
            while len(ids) < len(prompt) + 12:
                best = int(np.argmax(np.array(talker.model.net(mx.array(np.array(ids))[None])[0, -1])))
                if best in stops:
                    break
                ids.append(best)
        np.testing.assert_array_equal(tokens, ids[len(prompt) :])
    assert sum(map(len, batched)) > 12


def test_stop_tokens_end_a_text_and_are_not_part_of_it(talker):
    prompts = [np.array([5, 9, 30], np.int32), np.array([77, 8, 200, 11], np.int32)]
    talker._stops = ()
    free = talker.generate(prompts, Sampling(max_tokens=10, temperature=0))
    assert [len(t) for t in free] == [10, 10]
    talker._stops = (int(free[0][4]), int(free[1][7]))
    for tokens, whole in zip(talker.generate(prompts, Sampling(max_tokens=10, temperature=0)), free, strict=True):
        first = min(list(whole).index(s) for s in talker._stops if s in whole)
        np.testing.assert_array_equal(tokens, whole[:first])
    talker._stops = None
    talker.generate(prompts[:1], Sampling(max_tokens=1))
    assert set(talker._stops) >= {0, 2}  # of the generation config


def test_sampling_follows_the_seed_and_not_the_batch(talker):
    prompts = [np.random.default_rng(i).integers(3, 384, 4).astype(np.int32) for i in range(4)]
    talker._stops = ()
    sampling = Sampling(max_tokens=8, temperature=1.0, top_p=0.9, seed=1)
    state = np.array(mx.random.state[0])
    first = talker.generate(prompts, sampling)
    again = talker.generate(prompts, replace(sampling, batch_size=2))
    other = talker.generate(prompts, replace(sampling, seed=2))
    np.testing.assert_array_equal(np.array(mx.random.state[0]), state)
    np.testing.assert_array_equal(np.stack(first), np.stack(again))
    assert (np.stack(first) != np.stack(other)).any(1).all()


def test_pick_draws_from_the_nucleus():
    probability = np.array([0.1, 0.4, 0.05, 0.25, 0.2])
    uniform = (np.arange(20000) + 0.5) / 20000
    logits = np.broadcast_to(np.log(probability), (20000, 5)).astype(np.float32)
    share = lambda t, p: np.bincount(pick(logits, t, p, uniform), minlength=5) / 20000  # noqa: E731
    np.testing.assert_allclose(share(1.0, 1.0), probability, atol=1e-4)
    np.testing.assert_allclose(share(1.0, 0.8), np.array([0, 0.4, 0, 0.25, 0.2]) / 0.85, atol=1e-4)
    np.testing.assert_allclose(share(0.5, 1.0), probability**2 / (probability**2).sum(), atol=1e-4)
    np.testing.assert_array_equal(share(0, 0.5), [0, 1, 0, 0, 0])


# --- Device -----------------------------------------------------------------------------------------------------------------------


def test_devices_and_options_that_are_not_there(tiny_llama):
    with pytest.raises(BackendError, match="unknown device 'tpu'"):
        device.choose_device("tpu")
    if not device.has_gpu():
        with pytest.raises(BackendError, match="no cuda:1 here, only cpu"):
            device.choose_device("cuda:1")
    with pytest.raises(BackendError, match=r"quantize: nf4 .*--backend torch"):
        load(tiny_llama, quantize="nf4")
    report = upo_mlx.device_report()
    assert "cpu" in report["devices"] and report["memory_gb"] > 0 and report["version"]
    assert 0.01 < load(tiny_llama).peak_memory_gb() < 100


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux" or device.has_gpu(), reason="the BLAS matters to MLX on Linux CPUs")
def test_a_real_blas_takes_the_place_of_the_wheels():
    report = "from upo_mlx import device; print(device.BLAS, device.matmul_rate(), sep='|')"
    (_, slow), (found, fast) = (run_python(first + report).strip().split("|") for first in ("import mlx.core; ", ""))
    if found.startswith("reference"):
        pytest.skip("no OpenBLAS, mkl or torch here")
    assert float(fast) > 4 * float(slow)  # about 20 times on an idle machine


def test_importing_the_package_needs_no_mlx():
    assert run_python("import sys; sys.modules['mlx'] = sys.modules['mlx.core'] = None; import upo_mlx; print(upo_mlx.name)").strip() == "mlx"


def test_torch_is_never_needed(tiny_llama):
    code = f"""
import sys
sys.modules["torch"] = None
import numpy as np, upo_mlx
from upo.config import load_config
from upo.data.batch import Example, collate
learner = upo_mlx.load(load_config({{"model": {str(tiny_llama)!r}, "data": {{"train": "x"}}, "objective": {{"preference": {{"loss": "sft"}}}}}}))
row = Example("t:1", "unpaired", np.array([5, 6], np.int32), (np.array([7, 8], np.int32),), (1,))
print([learner.step(collate([row]), 1e-2).logp[0] for _ in range(3)])
"""
    logps = json.loads(run_python(code).replace("np.float32(", "").replace(")", ""))
    assert logps[2] > logps[0]


def test_weights_that_are_missing_or_not_numbers_are_told_as_such(make_tiny_llama):
    folder = make_tiny_llama()
    arrays = tensors.read(folder / "model.safetensors")
    arrays["model.norm.weight"][0] = np.nan
    tensors.write(folder / "model.safetensors", arrays, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"^model: its logits are not finite: the weights hold NaN"):
        Model(load_base(folder, mx.float32)[0]).check()
    del arrays["model.norm.weight"]
    tensors.write(folder / "model.safetensors", arrays, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"\(Missing 1 parameters: model\.norm\.weight\.?\)\. Is the download complete.* use --backend torch"):
        load_base(folder, mx.float32)
