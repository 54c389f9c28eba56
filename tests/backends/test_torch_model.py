"""Loading, targets, LoRA layers, families and generation of the PyTorch backend."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import upo_torch  # noqa: E402
from upo import random, tensors  # noqa: E402
from upo.adapters import Adapter  # noqa: E402
from upo.backend import Sampling  # noqa: E402
from upo.config import load_config  # noqa: E402
from upo.data.forest import Forest  # noqa: E402
from upo.errors import BackendError, ModelError  # noqa: E402
from upo.targets import expand_targets, fresh_arrays  # noqa: E402
from upo_torch import device  # noqa: E402
from upo_torch.logps import token_logps  # noqa: E402
from upo_torch.model import Model, load_base  # noqa: E402

CPU = torch.device("cpu")


def load(folder, **sections):
    adapter = {"rank": 4, "alpha": 8, **sections.pop("adapter", {})}
    return upo_torch.load(load_config({"model": str(folder), "device": "cpu", "data": {"train": "none.jsonl"}, "adapter": adapter, **sections}))


def forest(seed: int = 0) -> Forest:
    rng = np.random.default_rng(seed)
    tokens = lambda n: rng.integers(3, 384, n).astype(np.int32)  # noqa: E731
    return Forest((tokens(7), tokens(3), tokens(12)), tuple(tokens(n) for n in (5, 1, 9, 4)), np.array([0, 2, 0, 1]))


def one_by_one(learner, forest: Forest) -> list[float]:
    """Log-probs from the network's own logits, each completion alone."""
    out = []
    for p, c in zip(forest.owner, forest.completions, strict=True):
        ids = torch.from_numpy(np.concatenate([forest.prompts[p], c])).long()[None]
        with torch.no_grad():
            logits = learner.model.net(input_ids=ids).logits[0, len(forest.prompts[p]) - 1 : -1].double()
        out.append(float(torch.log_softmax(logits, -1)[torch.arange(len(c)), torch.from_numpy(c).long()].sum()))
    return out


def shake(learner, seed: int = 3, size: float = 0.2) -> None:
    rng = np.random.default_rng(seed)
    state = learner.state()
    state["adapter"] = {k: (a + size * rng.standard_normal(a.shape)).astype(np.float32) for k, a in state["adapter"].items()}
    learner.load_state(state)


@pytest.mark.parametrize("tied", [False, True])
def test_logps_equal_unbatched_scoring(make_tiny_llama, tied):
    learner = load(make_tiny_llama(tied=tied))
    base = learner.logps(forest())
    np.testing.assert_allclose(base, one_by_one(learner, forest()), atol=3e-5)
    shake(learner)
    moved = learner.logps(forest())
    assert np.abs(moved - base).min() > 0.1
    np.testing.assert_allclose(moved, one_by_one(learner, forest()), atol=3e-5)


def test_prompt_states_are_those_of_the_prompt_alone(tiny_llama):
    learner = load(tiny_llama)
    states = learner.prompt_states(forest())
    for state, prompt in zip(states, forest().prompts, strict=True):
        with torch.no_grad():
            alone = learner.model.decoder(input_ids=torch.from_numpy(prompt).long()[None]).last_hidden_state[0, -1]
        np.testing.assert_allclose(state, alone, atol=2e-6)


def test_initial_adapter_is_seeded_by_name(tiny_llama):
    before = torch.random.get_rng_state()
    learner = load(tiny_llama, train={"seed": 7})
    adapter = learner.state()["adapter"]
    assert len(adapter) == 2 * 7 * 2
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    np.testing.assert_array_equal(adapter[name], random.lora_a(4, 128, 7, name))
    assert all((a == 0).all() == ("lora_B" in n) for n, a in adapter.items())
    assert learner.info.parameters == sum(np.prod(a.shape) for a in _tensors(tiny_llama).values())
    assert learner.info.trainable == sum(a.size for a in adapter.values())
    assert torch.equal(torch.random.get_rng_state(), before)


def _tensors(folder) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(str(folder / "model.safetensors"))


def test_names_are_pefts_own(tiny_llama, tmp_path):
    """What PEFT saves, and what it computes from what we save."""
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    from upo.adapters import write_adapter

    learner = load(tiny_llama, adapter={"targets": ["q_proj", "down_proj"]})
    shake(learner)
    ours, theirs = learner.state()["adapter"], get_peft_model_state_dict(learner.model._peft)
    assert ours.keys() == theirs.keys()
    write_adapter(tmp_path / "a", ours, learner.adapter_config())
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), tmp_path / "a")
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        np.testing.assert_allclose(peft(ids).logits, learner.model.net(ids).logits, atol=2e-5)


def test_targets(tiny_llama):
    assert load(tiny_llama, adapter={"targets": ["v_proj", "self_attn.q_proj"]}).info.targets == ("q_proj", "v_proj")
    one = load(tiny_llama, adapter={"targets": "model.layers.1.mlp.up_proj"})
    assert len(one.state()["adapter"]) == 2 and one.adapter_config()["target_modules"] == ["model.layers.1.mlp.up_proj"]
    with pytest.raises(ModelError, match=r"called w_pack, z_proj\. There are: down_proj, .*v_proj\."):
        load(tiny_llama, adapter={"targets": ["q_proj", "z_proj", "w_pack"]})
    with pytest.raises(ModelError, match="lm_head"):
        load(tiny_llama, adapter={"targets": ["lm_head"]})


def test_rope_of_transformers_5_is_read(make_tiny_llama):
    folder = make_tiny_llama()
    both = load(folder).logps(forest())
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_theta", "rope_parameters"):
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != key}))
        np.testing.assert_array_equal(load(folder).logps(forest()), both)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if not k.startswith("rope_")}))
    assert np.abs(load(folder).logps(forest()) - both).max() > 1e-2  # theta does matter here


def test_bfloat16_base_multiplies_lora_in_bfloat16_from_float32_masters(tiny_llama):
    learner = load(tiny_llama, dtype="bfloat16", objective={"preference": {"loss": "sft"}})
    whole = load(tiny_llama)
    assert learner.info.dtype == "bfloat16" and whole.info.dtype == "float32"
    for each in (learner, whole):
        shake(each, size=0.05)
    seen: list[tuple[torch.dtype, ...]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
                seen.append(tuple(arg.dtype for arg in args))
            return function(*args, **(kwargs or {}))

    with Watch():
        hidden = learner.model.hidden(torch.arange(3, 20)[None])
    assert hidden.dtype == torch.bfloat16
    assert len(seen) == 3 * 7 * 2 and {dtype for dtypes in seen for dtype in dtypes} == {torch.bfloat16}  # base, A and B of 7 layers, twice
    hidden.float().square().sum().backward()
    for name, param in learner.model.policy.items():
        assert param.dtype == param.grad.dtype == torch.float32
        assert param.grad.abs().max() > 0, name
    np.testing.assert_allclose(learner.logps(forest()), whole.logps(forest()), atol=1.0)  # bf16 has 8 bits
    assert np.abs(learner.logps(forest()) - whole.logps(forest())).max() > 1e-4


# --- Families ---------------------------------------------------------------------------------------------------------------------

FAMILY = {
    "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "vocab_size": 90, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 8, "final_logit_softcapping": 2.0},  # soft-capped logits, a window
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.25, "residual_multiplier": 0.5, "attention_dropout": 0.5},
    "cohere": {"logit_scale": 0.25},
    "phi": {"num_key_value_heads": 2, "partial_rotary_factor": 0.5, "resid_pdrop": 0.5},  # a head with a bias; dropout in its config
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True},
    "mistral": {"sliding_window": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.5, "layerdrop": 0.0},  # projects out of the decoder
}  # fmt: skip


def family_folder(family: str, folder):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**FAMILY, **FAMILIES.get(family, {})})).float()
        for param in net.parameters():  # freshly made, they are small and biases are 0
            param.data += 0.1 * torch.randn_like(param)
    net.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_families_head_and_recomputation(family, tmp_path):
    net, _ = load_base(family_folder(family, tmp_path), torch.float32, CPU)
    model = Model(net, CPU)
    model.check()
    paths = expand_targets(model.dims(), "all-linear")
    rng = np.random.default_rng(0)
    arrays = {k: (0.2 * rng.standard_normal(a.shape)).astype(np.float32) for k, a in fresh_arrays(model.dims(), paths, 2, 0).items()}
    model.add_policy(Adapter(2, 1.0, 0.5, tuple(paths), arrays, None, {}))
    ids, targets = torch.from_numpy(rng.integers(3, 90, (2, 12))), torch.from_numpy(rng.integers(0, 90, 24))

    def plain() -> torch.Tensor:
        return torch.log_softmax(net(input_ids=ids, use_cache=False).logits.flatten(0, 1), -1)[torch.arange(24), targets]

    def ours() -> torch.Tensor:
        return token_logps(model.head, model.head.width, model.hidden(ids), targets)

    def gradient(score) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        net.zero_grad()
        logp = score()
        logp.sum().backward()
        return logp.detach().numpy(), {name: p.grad.numpy().copy() for name, p in model.policy.items() if p.grad is not None}

    expected, exact = gradient(plain)
    got, grads = gradient(ours)
    with model.recomputing():
        again, regrads = gradient(ours)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    np.testing.assert_array_equal(again, got)
    assert len(exact) == len(model.policy)
    scale = max(np.abs(g).max() for g in exact.values())
    for name, g in exact.items():
        assert np.abs(g).max() > 1e-6 * scale, name  # a layer that gets no gradient would compare equal
        np.testing.assert_allclose(grads[name], g, atol=1e-5 * scale, err_msg=name)
        np.testing.assert_allclose(regrads[name], grads[name], atol=1e-6 * scale, err_msg=name)
    assert not any(m.training for m in net.modules() if hasattr(m, "gradient_checkpointing"))


def test_recomputation_runs_the_layers_again(tiny_llama):
    learner = load(tiny_llama)
    layer, calls = learner.model.decoder.layers[0].mlp, []
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    with learner.model.recomputing():
        learner.model.hidden(torch.arange(3, 9)[None]).sum().backward()
    assert len(calls) == 2
    learner.model.hidden(torch.arange(3, 9)[None]).sum().backward()
    assert len(calls) == 3


def test_refused_models(tiny_llama, make_tiny_llama, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    folder = make_tiny_llama()
    config = json.loads((folder / "config.json").read_text())

    def with_config(**changes):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return folder

    with pytest.raises(ModelError, match=r"MLX 4-bit model\. Use --backend mlx"):
        load(with_config(quantization={"group_size": 64, "bits": 4}))
    with pytest.raises(ModelError, match=r"'llama9' is unknown to this transformers\. Update it"):
        load(with_config(model_type="llama9"))
    with pytest.raises(ModelError, match=r"the weights lack model\.layers\.2\.input_layernorm\.weight, .* and 6 more"):
        load(with_config(num_hidden_layers=3))
    assert any("does not use: model.layers.1." in note for note in load(with_config(num_hidden_layers=1)).info.notes)
    with pytest.raises(ModelError, match=r"the weights lack lm_head\.weight, model\.embed_tokens\.weight, or have them in another shape"):
        load(with_config(vocab_size=500))
    with pytest.raises(ModelError, match=r"transformers cannot load this model \(.*num_attention_heads.* expected int, got str"):
        load(with_config(num_attention_heads="four"))
    with pytest.raises(ModelError, match="encoder-decoder"):
        T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=90)).save_pretrained(tmp_path / "t5")
        load_base(tmp_path / "t5", torch.float32, CPU)
    with pytest.raises(ModelError, match="this model has no linear layer that could carry an adapter"):
        expand_targets(Model(load_base(family_folder("gpt2", tmp_path / "gpt2"), torch.float32, CPU)[0], CPU).dims(), "all-linear")
    with pytest.raises(BackendError, match=r"quantize: nf4 needs CUDA, and this is cpu\. Use quantize: none"):
        load(tiny_llama, quantize="nf4")


def test_a_folder_that_is_quantised_already_is_refused(tiny_llama, tmp_path):
    """bitsandbytes on a CPU, for one, returns a wrong gradient and no error; the kernels of others have no backward pass."""
    folder = shutil.copytree(tiny_llama, tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}))
    with pytest.raises(ModelError, match=r"packed: is quantised \(bitsandbytes\), and upo does not train on that\. Use the original model"):
        load(folder)


def test_a_head_that_is_not_the_networks_is_refused(tiny_llama):
    net, _ = load_base(tiny_llama, torch.float32, CPU)
    model = Model(net, CPU)
    model.check()
    model.head = replace(model.head, scale=1.1)
    with pytest.raises(ModelError, match="self-check failed"):
        model.check()


# --- Generation -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talker(tiny_llama):
    learner = load(tiny_llama)
    shake(learner)
    return learner


def test_greedy_in_batches_equals_greedy_alone(talker):
    prompts = [np.random.default_rng(i).integers(3, 384, n).astype(np.int32) for i, n in enumerate((5, 11, 2, 5, 8))]
    stops = talker._stops = (0, 2)
    batched = talker.generate(prompts, Sampling(max_tokens=12, temperature=0, batch_size=3))
    for prompt, tokens in zip(prompts, batched, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 12:
            with torch.no_grad():
                best = int(talker.model.net(torch.tensor([ids])).logits[0, -1].argmax())
            if best in stops:
                break
            ids.append(best)
        np.testing.assert_array_equal(tokens, ids[len(prompt) :])
        assert tokens.dtype == np.int32
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
    state = torch.random.get_rng_state()
    first = talker.generate(prompts, sampling)
    again = talker.generate(prompts, replace(sampling, batch_size=2))
    other = talker.generate(prompts, replace(sampling, seed=2))
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(np.stack(first), np.stack(again))
    assert (np.stack(first) != np.stack(other)).any(1).all()


def test_a_folders_own_sampling_options_are_not_applied(make_tiny_llama, talker):
    folder = make_tiny_llama()
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "repetition_penalty": 5.0, "do_sample": True, "top_k": 1, "max_length": 5}))
    other = load(folder)
    shake(other)
    other._stops = talker._stops = ()
    for sampling in (Sampling(max_tokens=12, temperature=0), Sampling(max_tokens=12, temperature=1.0)):
        ours, plain = (each.generate([np.array([5, 6, 7], np.int32)], sampling)[0] for each in (other, talker))
        np.testing.assert_array_equal(ours, plain)


# --- Device -----------------------------------------------------------------------------------------------------------------------


def test_devices_that_are_not_there(tiny_llama):
    for name in ("tpu", "cpu:1", "cuda:x"):
        with pytest.raises(BackendError, match=f"unknown device '{name}'"):
            device.choose_device(name)
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        for name in ("gpu", "cuda:1", "mps"):
            with pytest.raises(BackendError, match=f"no {name} here, only cpu"):
                device.choose_device(name)
        assert device.choose_device("auto") == CPU
    assert device.choose_dtype("auto", CPU) == (torch.float32, [])
    assert device.choose_dtype("float16", CPU) == (torch.float16, [])
    report = upo_torch.device_report()
    assert report["devices"][-1] == "cpu" and report["memory_gb"] > 0 and report["version"] == torch.__version__
    json.dumps(report)
    assert 0.01 < load(tiny_llama).peak_memory_gb() < 100


def test_processes_of_another_launcher_are_refused(monkeypatch):
    monkeypatch.setenv("MLX_RANK", "1")
    with pytest.raises(BackendError, match=r"mlx\.launch .* torchrun"):
        device.TorchComm()


def test_importing_the_package_needs_no_torch():
    code = """
import sys
sys.modules["torch"] = sys.modules["peft"] = None
import upo_torch
from upo.errors import BackendError
for call in (upo_torch.device_report, lambda: upo_torch.load(None)):
    try:
        call()
    except BackendError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count('pip install "upo[torch]"') == 2


def test_weights_that_are_not_numbers_are_told_as_such(make_tiny_llama):
    folder = make_tiny_llama()
    arrays = tensors.read(folder / "model.safetensors")
    arrays["model.norm.weight"][0] = np.nan
    tensors.write(folder / "model.safetensors", arrays, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"^model: its logits are not finite: the weights hold NaN"):
        load(folder)
