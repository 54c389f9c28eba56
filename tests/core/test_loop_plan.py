"""The dry run: what it counts, against the run itself and against sizes worked out by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from fake_learner import configure

from upo import tensors
from upo.backend import get_backend
from upo.errors import BackendError, ConfigError, DataError
from upo.memory import model_shapes
from upo.training import plan as planning
from upo.training.plan import plan
from upo.training.reporter import Recorder, Silent

ROWS = 20
UPO = {"preset": "upo", "auxiliary": {"rewards": [{"scorer": "length"}], "actor_warmup_steps": 1}}


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"what is {i} and {i}", "chosen": "the answer is " + "that " * i, "rejected": "not"} for i in range(ROWS)]
    rows[3]["chosen"] = "the " * 400  # longer than max_length
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small(model, data, objective=UPO, **sections):
    return configure(objective, model=str(model), data={"train": str(data), "eval": 0.2}, train={"max_length": 200, "batch_size": 4, "epochs": 2}, **sections)


def test_what_a_run_would_do(tiny_llama, data):
    found = plan(small(tiny_llama, data, adapter={"rank": 8}, optimizer={"warmup_steps": 2}, device="cpu", dtype="float32"))
    rows = found["rows"]
    assert rows["read"] == ROWS and rows["dropped"] == 1 and rows["train"] + rows["eval"] == ROWS - 1 and rows["eval"] >= 1
    steps = 2 * -(-rows["train"] // 4)
    assert found["steps"] == steps and found["epochs"] == 2.0
    assert found["warmup_share"] == {"lr": 2 / steps, "actor": 1 / steps}
    assert found["reference_completions"] == 4 * (ROWS - 1)  # two of its own and two partners per pair
    assert found["tokens"]["per_row"] == found["tokens"]["train"] / rows["train"] > 10
    # 2 layers: q 64x64, k and v 64x32, o 64x64, gate and up 64x128, down 128x64
    adapter = 8 * 2 * (128 + 96 + 96 + 128 + 192 + 192 + 192)
    base = 2 * 384 * 64 + 64 + 2 * (2 * 64 + 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128)
    assert found["parameters"] == {"base": base, "adapter": adapter}
    memory = found["memory_gb"]
    assert memory["base"] == 4 * base / 1e9 and memory["adapter"] == 16 * adapter / 1e9
    assert memory["total"] == pytest.approx(memory["base"] + memory["adapter"] + memory["activations"])


def test_options_that_change_the_estimate(tiny_llama, data):
    plain = plan(small(tiny_llama, data, {"preference": {"loss": "sft"}}, dtype="bfloat16"))
    assert plain["reference_completions"] == 0 and plain["warmup_share"]["actor"] == 0
    other = plan(
        small(tiny_llama, data, {"preference": {"loss": "dpo"}}, dtype="float32", adapter={"targets": ["q_proj", "o_proj"], "rank": 2}, optimizer={"name": "rmsprop"})
    )
    assert other["reference_completions"] == 2 * (ROWS - 1)
    assert other["parameters"]["adapter"] == 2 * 2 * (128 + 128)
    assert other["memory_gb"]["base"] == 2 * plain["memory_gb"]["base"]
    assert other["memory_gb"]["adapter"] == 12 * other["parameters"]["adapter"] / 1e9


def test_whether_activations_are_recomputed(tiny_llama, data, monkeypatch):
    """As the backend would decide with what is free on the device; without the backend nothing is known."""

    def asked(given="auto", tokens="auto"):
        train = {"gradient_checkpointing": given, "micro_batch_tokens": tokens}
        return plan(configure(UPO, model=str(tiny_llama), data={"train": str(data)}, train=train))

    monkeypatch.setattr(planning, "installed", lambda name: True)
    found = []
    for free in (10**8, 10**11):
        monkeypatch.setattr(planning, "get_backend", lambda name, free=free: SimpleNamespace(check=lambda config: None, free_memory=lambda device: ("cuda", free)))
        found.append(asked())
    on, off = found
    assert on["gradient_checkpointing"].startswith("on (about 0.2 GB instead of 0.2 GB; 0.1 GB free") and off["gradient_checkpointing"].startswith("off (about ")
    assert (on["micro_batch_tokens"], off["micro_batch_tokens"]) == (2048, 65536)
    assert on["memory_gb"]["activations"] < off["memory_gb"]["activations"]
    assert asked(True, 2048)["memory_gb"] == on["memory_gb"] and asked(False)["memory_gb"] == off["memory_gb"]
    monkeypatch.setattr(planning, "installed", lambda name: False)
    assert asked()["micro_batch_tokens"] == 2048 and asked()["gradient_checkpointing"] == "decided when the model is loaded (torch is not installed here)"


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"device": "tpu"}, "device: unknown device 'tpu'. Known: auto, cpu, gpu, cuda, cuda:N, mps."),
        ({"device": "cpu", "quantize": "nf4"}, {"torch": "quantize: nf4 needs CUDA, and this is cpu.", "mlx": "quantize: nf4 needs bitsandbytes on CUDA (--backend torch)."}),
        ({"device": "cpu", "train": {"wired_limit_gb": 1}}, {"torch": "train.wired_limit_gb: is MLX's.", "mlx": "train.wired_limit_gb: memory is wired on Metal only."}),
    ],
)
def test_what_a_run_would_refuse_here(tiny_llama, data, backend, section, words):
    """In the words of the run itself, which loads a model for it no more than the plan does."""
    words = words if isinstance(words, str) else words[backend]
    config = configure(UPO, model=str(tiny_llama), data={"train": str(data)}, backend=backend, **section)
    with pytest.raises(BackendError) as planned:
        plan(config)
    with pytest.raises(BackendError) as loaded:
        get_backend(backend).load(config)
    assert str(planned.value) == str(loaded.value) and words in str(planned.value)


def test_a_gpu_that_is_not_there(tiny_llama, data, backend):
    if any(name != "cpu" for name in get_backend(backend).device_report()["devices"]):
        pytest.skip("there is a GPU here")
    with pytest.raises(BackendError, match=r"device: .* has no cuda here, only cpu"):
        plan(configure(UPO, model=str(tiny_llama), data={"train": str(data)}, backend=backend, device="cuda"))


def test_packed_weights_are_counted_unpacked(tmp_path):
    """4 bit: 64 inputs lie in 8 words of 32 bits."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "quantization": {"bits": 4, "group_size": 32}}))
    name = "model.layers.0.self_attn.q_proj"
    tensors.write(
        tmp_path / "model.safetensors",
        {f"{name}.weight": np.zeros((32, 8), np.uint32), f"{name}.scales": np.zeros((32, 2), np.float16), f"{name}.biases": np.zeros((32, 2), np.float16)},
    )
    shapes = model_shapes(tmp_path)
    assert shapes.parameters == 32 * 64 and shapes.linears == {name: (64, 32)} and shapes.stored == 32 * 8 * 4 + 2 * 32 * 2 * 2


def test_refusals(tiny_llama, data, tmp_path):
    with pytest.raises(ConfigError, match=r'adapter\.targets: the model has no linear layer "q_pro"\. Did you mean "q_proj"'):
        plan(small(tiny_llama, data, adapter={"targets": ["q_pro"]}))
    with pytest.raises(DataError, match="nothing"):
        plan(small(tiny_llama, tmp_path / "nothing.jsonl"))
    absent = {"preset": "upo", "auxiliary": {"rewards": [{"scorer": "length"}, {"scorer": "column", "column": "score"}]}}
    with pytest.raises(DataError, match=r'no number in column "score"'):
        plan(small(tiny_llama, data, absent))
    kto = small(tiny_llama, data, {"preference": {"loss": "kto"}})
    one_prompt = kto.model_copy(update={"data": kto.data.model_copy(update={"eval": 0.01})})
    with pytest.raises(DataError, match=r"^data\.eval: .*pairs\.jsonl:\d+: its prompt owns 2 of 2 completions; .* Or raise data\.eval, so that more prompts are held out\.$"):
        plan(one_prompt)
    never = {"preset": "upo", "auxiliary": {**UPO["auxiliary"], "actor_warmup_steps": 1000}}
    with pytest.raises(ConfigError, match="actor stays off"):
        plan(small(tiny_llama, data, never))


def test_rows_beyond_the_models_context_are_named(make_tiny_llama, data):
    folder = make_tiny_llama()
    config = json.loads((folder / "config.json").read_text())
    for changes, told in (({"max_position_embeddings": 20}, True), ({"max_position_embeddings": 200}, False), ({"max_position_embeddings": 20, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, False)):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        reporter = Recorder(Silent())
        plan(small(folder, data), reporter=reporter)
        found = [text for text in reporter.warnings if "longer than the 20 tokens that the model was made for" in text]
        assert len(found) == told and all("pairs.jsonl:" in text and text.endswith("Lower train.max_length to 20, or use a model with a longer context.") for text in found)
