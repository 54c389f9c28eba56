"""Random models of many families on PyTorch with an adapter, log-probs and gradients in any layout. Shared by tests."""

from __future__ import annotations

import copy

import numpy as np
import tiny_families
import torch

from upo.adapters import Adapter, lora_name
from upo.data.forest import Forest
from upo_torch.logps import token_logps
from upo_torch.model import Model, attention_of

CPU = torch.device("cpu")
FAMILIES = {**tiny_families.DENSE, **tiny_families.MIXTURES, **tiny_families.LOST}
# What lays down what a layer sees, or how it weighs it, sharply enough to matter in texts of 40 tokens.
VARIANTS = {
    "mistral": {"sliding_window": 8},
    "phi3": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "gemma2": {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0, "sliding_window": 7},
    "llama": {"tie_word_embeddings": True},
    "granite": {"attention_multiplier": 0.7, "logits_scaling": 3.0},
}


def tiny(name: str, rank: int = 4, dtype=torch.float32, device=CPU, **changes) -> Model:
    """A random model of a family (with a star: its variant) with a random adapter on the linear layers of its attention."""
    import transformers

    kind = name.rstrip("*")
    options = {**tiny_families.COMMON, "rope_parameters": tiny_families.ROPE, **FAMILIES[kind].options} if kind in FAMILIES else {}
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**copy.deepcopy({**options, **(VARIANTS[kind] if name.endswith("*") else {}), **changes}))
    net = transformers.AutoModelForCausalLM.from_config(config, **attention_of(config)).to(dtype).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model = Model(net.to(device).requires_grad_(False), device)
    rng = np.random.default_rng(1)
    dims = {path: size for path, size in model.dims().items() if "attn" in path or "attention" in path}
    shapes = {lora_name(path, side): (rank, i) if side == "A" else (o, rank) for path, (i, o) in dims.items() for side in "AB"}
    arrays = {name: (0.1 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    if dims:
        model.add_policy(Adapter(rank, 2.0 * rank, 2.0, tuple(dims), arrays, None, {}))
    return model


def forest(counts: tuple[int, ...] = (2, 1, 4, 0, 3), seed: int = 0, longest: int = 14) -> Forest:
    """Prompts with so many completions each, the completions of all prompts mixed."""
    rng = np.random.default_rng(seed)
    tokens = lambda n: rng.integers(3, 96, n).astype(np.int32)  # noqa: E731
    owner = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    return Forest(tuple(tokens(rng.integers(2, 30)) for _ in counts), tuple(tokens(rng.integers(1, longest)) for _ in owner), owner)


def scored(model: Model, layout) -> torch.Tensor:
    """[N] log-probs of completions."""
    own, src, tgt = (torch.from_numpy(a).to(model.device) for a in (layout.own, layout.src, layout.tgt))
    tokens = token_logps(model.head, model.head.width, model.hidden_of(layout)[src], tgt)
    return torch.zeros(int(own.max()) + 1, device=model.device).index_add(0, own, tokens)


def gradients(model: Model, layout, recompute: bool = False) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Log-probs, and the adapter's gradient of a weighted sum of them."""
    for parameter in model.policy.values():
        parameter.grad = None
    with model.recomputing() if recompute else torch.enable_grad():
        logp = scored(model, layout)
        (logp * torch.linspace(-1, 2, len(logp), device=logp.device)).sum().backward()
    return logp.detach().cpu().numpy(), {name: p.grad.cpu().numpy().copy() for name, p in model.policy.items() if p.grad is not None}


def apart(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Largest deviation of any array, relative to its own largest entry."""
    assert a.keys() == b.keys() and a
    return max(np.abs(a[k] - b[k]).max() / np.abs(a[k]).max() for k in a if np.abs(a[k]).max() > 1e-7)
