"""The implicit reward of an adapter: against transformers with the adapter merged by hand, on both backends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from upo import tensors
from upo.adapters import write_adapter
from upo.errors import BackendError, DataError, ModelError
from upo.rewards import Answer, build_scorer

RANK, ALPHA, LAYER = 2, 3.0, "model.layers.1.self_attn.q_proj"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPO_CACHE", str(tmp_path / "cache"))


def write(folder: Path, b_scale: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((RANK, 64)).astype(np.float32), (b_scale * rng.standard_normal((64, RANK))).astype(np.float32)
    arrays = {f"base_model.{'model.' + LAYER}.lora_A.weight": a, f"base_model.{'model.' + LAYER}.lora_B.weight": b}
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": [LAYER], "lora_dropout": 0.0, "bias": "none", "task_type": "CAUSAL_LM"}
    write_adapter(folder, arrays, config)
    return {"A": a, "B": b}


def answers(*texts: str) -> list[Answer]:
    return [Answer(f"d.jsonl:{i}", "what is it", text, turns=({"role": "user", "content": "what is it"},)) for i, text in enumerate(texts, 1)]


def test_an_adapter_that_changes_nothing_prefers_nothing(backend: str, tiny_llama: Path, tmp_path: Path) -> None:
    write(tmp_path / "a", 0.0)
    found = build_scorer("implicit", model=str(tiny_llama), adapter=str(tmp_path / "a"), backend=backend, dtype="float32").score(answers("you", "the answer"))
    assert found == pytest.approx([0.0, 0.0], abs=1e-6)  # both sums are the same up to float32 rounding of equal shapes


def test_values(backend: str, make_tiny_llama, tmp_path: Path) -> None:
    """beta * (log pi - log ref) over the answer and its end of turn; 1e-4: float32 sums over 30 tokens on another framework."""
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    folder = make_tiny_llama()
    lora = write(tmp_path / "a", 0.3)
    texts = ["The answer is that you are not kind.", "I"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt = tokenizer.encode("<|im_start|>user\nwhat is it<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False).ids

    def logps() -> list[tuple[float, int]]:
        net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        found = []
        for text in texts:
            answer = [*tokenizer.encode(text, add_special_tokens=False).ids, 2]
            with torch.no_grad():
                logits = net(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
            found.append((sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)), len(answer)))
        return found

    before = logps()
    weights = tensors.read(folder / "model.safetensors")
    weights[f"{LAYER}.weight"] = weights[f"{LAYER}.weight"] + ALPHA / RANK * lora["B"] @ lora["A"]
    merged = make_tiny_llama()
    tensors.write(merged / "model.safetensors", weights, metadata={"format": "pt"})
    base, folder = folder, merged
    after = logps()
    expected = [0.2 * (new - old) for (new, _), (old, _) in zip(after, before, strict=True)]
    assert max(map(abs, expected)) > 0.05
    options = {"model": str(base), "adapter": str(tmp_path / "a"), "backend": backend, "dtype": "float32", "beta": 0.2}
    assert build_scorer("implicit", **options).score(answers(*texts)) == pytest.approx(expected, abs=1e-4)
    per_token = [value / n for value, (_, n) in zip(expected, before, strict=True)]
    assert build_scorer("implicit", **options, per="token").score(answers(*texts)) == pytest.approx(per_token, abs=1e-4)


def test_what_it_refuses(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError):
        build_scorer("implicit", model=str(tiny_llama), adapter=str(tmp_path / "none"))
    write(tmp_path / "a", 0.0)
    options = {"model": str(tiny_llama), "adapter": str(tmp_path / "a"), "max_length": 8}
    with pytest.raises(DataError, match=r"d\.jsonl:1: scorer implicit: longer than 8 tokens"):
        build_scorer("implicit", **options).score(answers("you are kind"))
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(BackendError, match="Score the data first, with `upo score`"):
        build_scorer("implicit", **options)
