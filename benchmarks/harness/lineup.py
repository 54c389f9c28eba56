"""Who runs, and with which settings."""

from __future__ import annotations

import argparse

from harness.runs import Contender


def upo(backend: str, dtype: str, *settings: str, name: str = "", after: str | None = None, **more: object) -> Contender:
    """Ours on a backend and in a dtype; `settings` are overrides as on the command line."""
    chosen = {"set": [f"backend={backend}", f"dtype={dtype}", *settings], **more}
    return Contender(f"upo {backend} {dtype}{f', {name}' if name else ''}", "upo", chosen, after=after)


def trl(name: str, **config: object) -> Contender:
    return Contender(f"TRL {name}", "trl", {"config": config})


BFLOAT16 = {"bf16": True, "gradient_checkpointing": False, "model_init_kwargs": {"dtype": "bfloat16"}}
FLOAT32 = {"bf16": False, "gradient_checkpointing": False, "model_init_kwargs": {"dtype": "float32"}}

TRL_DEFAULT = trl("default")
# What makes it faster without changing the result; which of them is best depends on rows and machine, so they are all measured.
TRL_FAST = (
    trl("bf16", **BFLOAT16),
    trl("bf16, reference first", **BFLOAT16, precompute_ref_log_probs=True),
    Contender("TRL bf16, one pair at a time", "trl", {"config": BFLOAT16, "pairs_at_once": 1}),
)
MLX_LM_LORA = Contender("mlx-lm-lora", "mlx-lm-lora", {"dtype": "float32"})
MLX_LM_LORA_EAGER = Contender("mlx-lm-lora, not compiled", "mlx-lm-lora", {"dtype": "float32"}, {"MLX_DISABLE_COMPILE": "1"})
MLX_LM_LORA_SMALL = Contender(
    "mlx-lm-lora, not compiled, checkpointing", "mlx-lm-lora", {"dtype": "float32", "grad_checkpoint": True}, {"MLX_DISABLE_COMPILE": "1"}
)

UPO_TORCH = upo("torch", "bfloat16")
UPO_MLX = upo("mlx", "float32")

# Each of ours with those it is compared to.
COMPARED = {
    "torch": (UPO_TORCH, (TRL_DEFAULT, *TRL_FAST)),
    "mlx": (UPO_MLX, (MLX_LM_LORA, MLX_LM_LORA_EAGER, MLX_LM_LORA_SMALL)),
}
EQUAL = (
    upo("torch", "float32"),
    upo("mlx", "float32"),
    trl("float32", **FLOAT32),
    Contender("mlx-lm-lora float32", "mlx-lm-lora", {"dtype": "float32", "grad_norms": True}, {"MLX_DISABLE_COMPILE": "1"}),
)


def techniques(backend: str) -> list[Contender]:
    """Ours with each technique changed, one at a time; the first is ours as it is."""
    dtype = "bfloat16" if backend == "torch" else "float32"
    base = upo(backend, dtype)
    found = [
        base,
        upo(backend, dtype, name="reference in the cache", after=base.name),
        upo(backend, dtype, 'train.prefix_sharing="off"', name="no shared prompts"),
        upo(backend, dtype, name="all logits at once", plain_logits=True),
        upo(backend, dtype, "train.gradient_checkpointing=true", name="gradient checkpointing"),
        upo(backend, dtype, "train.micro_batch_tokens=100000", name="one micro-batch a step"),
    ]
    return [*found, *([upo(backend, "float32")] if backend == "torch" else [])]


def wanted(contender: Contender, options: argparse.Namespace) -> bool:
    """Whether --contender names it, if anything."""
    return not options.contender or any(part in contender.name for part in options.contender)
