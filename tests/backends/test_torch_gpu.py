"""PyTorch on a GPU: what the CPU tests cannot see. Skipped where there is none.

    pytest tests/backends/test_torch_gpu.py --require=torch

In float32 a GPU is held to the CPU's numbers; in bfloat16 the layouts and kernels are held to one another and to float32.
"""

from __future__ import annotations

import json
import math
import signal

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
if not torch.cuda.is_available() and not torch.backends.mps.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from learner_runs import UPO, configure, examples  # noqa: E402
from torch_models import CPU, apart, forest, gradients, scored, tiny  # noqa: E402

from upo.backend import Sampling  # noqa: E402
from upo.config import load_config  # noqa: E402
from upo.data.forest import padded  # noqa: E402
from upo.data.packed import packed  # noqa: E402
from upo.training.loop import train  # noqa: E402
from upo.training.reporter import Silent  # noqa: E402
from upo_torch import attention, load  # noqa: E402
from upo_torch.device import choose_device, device_report  # noqa: E402
from upo_torch.selfcheck import why_not_shared  # noqa: E402

GPU = choose_device("gpu")
CUDA = pytest.mark.skipif(GPU.type != "cuda", reason="needs CUDA")
FAMILIES = ["llama", "llama*", "mistral*", "qwen3", "gemma2*", "gemma3_text", "granite*", "gpt_oss", "qwen3_moe"]


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_is_the_cpus(name):
    """Shared prompts on the GPU against padded rows on the CPU. Other kernels round otherwise: the limits are those promised."""
    here, there = tiny(name, device=GPU), tiny(name, device=CPU)
    logps, slope = gradients(there, padded(forest()))
    for layout, recompute in ((padded(forest()), False), (packed(forest()), False), (packed(forest()), True)):
        if recompute and not here.net.supports_gradient_checkpointing:
            continue
        found, found_slope = gradients(here, layout, recompute)
        np.testing.assert_allclose(found, logps, atol=1e-4, rtol=0)
        assert apart(slope, found_slope) < 1e-4
    assert why_not_shared(here) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_shared_is_no_worse_than_padded(name):
    """Both differ from float32 by rounding alone, and sharing by at most twice what padding does (and 0.1 nats, of tens)."""
    exact, _ = gradients(tiny(name, device=GPU), padded(forest()))
    here = tiny(name, dtype=torch.bfloat16, device=GPU)
    plain, shared = (scored(here, layout).detach().float().cpu().numpy() for layout in (padded(forest()), packed(forest())))
    assert np.abs(shared - exact).max() < 2 * np.abs(plain - exact).max() + 0.1
    assert np.abs(exact).max() > 20


@CUDA
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (9, 3)])
def test_the_kernel_is_attention(window, heads):
    """torch's kernel for all segments at once against the same segments one by one, value and gradient, in bfloat16.

    Its inputs have 8 bits, so a result of about 1 is off by up to 2^-8, and gradients of a few terms by a little more.
    """
    trees = packed(forest()).trees
    sees = (lambda q, k: k <= q) if window is None else (lambda q, k: (k <= q) & (k > q - window))
    plan = attention.plan(trees, sees, window, GPU)
    tokens = sum(tree.tokens for tree in trees)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, tokens, 64, device=GPU, dtype=torch.bfloat16, requires_grad=True) for n in (heads[0], heads[1], heads[1]))
    up = torch.randn(1, tokens, heads[0], 64, device=GPU)
    assert attention._kernel(plan, q, v, None) == "torch", "this torch has no varlen_attn with windows and grouped heads"
    found, _ = attention.attend(torch.nn.Identity(), q, k, v, plan, scaling=0.3)
    slopes = torch.autograd.grad((found.float() * up).sum(), (q, k, v))
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected, _ = attention.attend(torch.nn.Identity(), *exact, plan, scaling=0.3)
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)
    for a, b in zip(slopes, torch.autograd.grad((expected * up).sum(), exact), strict=True):
        assert float((a.float() - b).norm() / b.norm()) < 1e-2


def rows(count: int) -> str:
    made = [{"prompt": f"What is {i} and {i}?", "chosen": "The answer is " + "that " * (i % 5 + 1), "rejected": f"I do not know {i}."} for i in range(count)]
    return "".join(json.dumps(row) + "\n" for row in made)


class Stopper(Silent):
    """Asks the run to stop, as Ctrl-C does, when a step is done."""

    def metrics(self, record):
        if record["step"] == 6 and "eval" not in record:
            signal.raise_signal(signal.SIGINT)


def run(folder, model, name: str, reporter=None, **sections) -> tuple[list[dict], dict]:
    """A run of UPO: its lines for steps, and its summary."""
    (folder / "rows.jsonl").write_text(rows(14))
    objective = {"preset": "upo", "auxiliary": {"rewards": [{"scorer": "length", "low": 3, "high": 9}]}}
    sections = {"backend": "torch", "dtype": "float32", "train": {"steps": 12, "batch_size": 4}, **sections}
    config = load_config({"model": str(model), "data": {"train": str(folder / "rows.jsonl")}, "adapter": {"rank": 8, "alpha": 16}, "objective": objective, "optimizer": {"lr": 2e-3}, **sections})  # fmt: skip
    summary = train(config, folder / name, resume=(folder / name).exists(), reporter=reporter or Silent())
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if not line.get("eval")], summary


def curve(lines: list[dict]) -> np.ndarray:
    return np.array([line["loss"] for line in lines])


def test_a_run_is_the_cpus(tiny_llama, tmp_path):
    """The same curve, and the second half on the other device stays on it. 1e-4: float32 sums in another order, through 12 steps of Adam."""
    cpu, _ = run(tmp_path, tiny_llama, "cpu", device="cpu")
    gpu, summary = run(tmp_path, tiny_llama, "gpu", device="gpu")
    np.testing.assert_allclose(curve(gpu), curve(cpu), rtol=1e-4)
    assert abs(curve(cpu)[-1] / curve(cpu)[0] - 1) > 1e-2
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, tiny_llama, "hop", Stopper(), device="gpu")
    hop, _ = run(tmp_path, tiny_llama, "hop", device="cpu")
    np.testing.assert_allclose(curve(hop), curve(cpu), rtol=1e-4)
    assert summary["peak_memory_gb"] > 0


def test_bfloat16_trains(tiny_llama, tmp_path):
    """`auto` is bfloat16 here; the adapter's masters stay float32, and the curve follows float32's while it falls by a fifth (4 % off were measured)."""
    wide, _ = run(tmp_path, tiny_llama, "wide")
    narrow, _ = run(tmp_path, tiny_llama, "narrow", dtype="auto")
    np.testing.assert_allclose(curve(narrow), curve(wide), rtol=8e-2)
    assert curve(wide)[-1] < 0.82 * curve(wide)[0]
    learner = load(configure(tiny_llama, UPO, backend="torch"))
    assert learner.info.dtype == "bfloat16" and learner.info.device.startswith(GPU.type)
    assert {p.dtype for p in learner.model.policy.values()} == {torch.float32}
    assert learner.info.layout == "packed"


def test_the_same_text_as_on_the_cpu(tiny_llama):
    prompts = [e.prompt for e in examples(4)]
    sampling = Sampling(max_tokens=12, temperature=0.9, top_p=0.9, seed=3)
    texts = []
    for device in ("cpu", "gpu"):
        learner = load(configure(tiny_llama, backend="torch", device=device, dtype="float32"))
        texts.append([tokens.tolist() for tokens in learner.generate(prompts, sampling)])
    assert texts[0] == texts[1] and len({tuple(t) for t in texts[0]}) > 1


@CUDA
def test_nf4(tiny_llama, tmp_path):
    """A 4-bit base: a quarter of the weights' size, a curve near the whole model's, and gradients that are those of its own weights."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    lines, _ = run(tmp_path, tiny_llama, "nf4", quantize="nf4", dtype="auto")
    assert all(math.isfinite(x) for x in curve(lines)) and lines[-1]["margin"] != 0
    learner = load(configure(tiny_llama, backend="torch", quantize="nf4"))
    kinds = {type(m).__name__ for m in learner.model.net.modules()}
    assert "Linear4bit" in kinds or "LoraLinear4bit" in kinds, kinds
    assert learner.info.layout == "packed" and learner.info.parameters == load(configure(tiny_llama, backend="torch")).info.parameters
    model, layout = learner.model, packed(forest())
    logps, slope = gradients(model, layout)
    name = next(n for n in model.policy if ".lora_B." in n)
    step = 0.05 * np.sign(slope[name])
    with torch.no_grad():
        model.policy[name].add_(torch.from_numpy(step).to(GPU))
    moved = scored(model, layout).detach().cpu().numpy()
    weights = np.linspace(-1, 2, len(logps))
    assert ((moved - logps) * weights).sum() == pytest.approx((step * slope[name]).sum(), rel=0.3)  # bfloat16, and curvature over a step that it resolves


@CUDA
def test_limits_and_report(tiny_llama):
    report = device_report()
    assert report["devices"][0] == "cuda:0" and report["device"] == torch.cuda.get_device_name(0) and report["memory_gb"] > 1
    learner = load(configure(tiny_llama, backend="torch", train={"memory_limit_gb": 4.0}))
    assert learner.info.chip == torch.cuda.get_device_name(0)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(int(6e9), dtype=torch.uint8, device=GPU)
    torch.cuda.set_per_process_memory_fraction(1.0)
