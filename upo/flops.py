"""How much arithmetic a step with a frozen base and LoRA needs, and how much a device could do: what `mfu` is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """What a token meets in a decoder, in weights."""

    linear: int  # of the decoder's linear layers, frozen
    adapter: int  # trained
    attention: int  # heads * size of a head, summed over layers
    head: int  # hidden size * vocabulary


@dataclass(frozen=True)
class Work:
    """What is computed for some texts, in one pass. All are counts, so they add up over micro-batches and ranks."""

    slots: int = 0  # token slots: tokens and padding
    tokens: int = 0  # slots that hold a token
    saved: int = 0  # tokens of prompts that stand in another slot already
    pairs: int = 0  # of a token and one it attends to, itself included
    scored: int = 0  # tokens of completions, which meet the head

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self.counts(), other.counts(), strict=True)))

    def counts(self) -> tuple[int, ...]:
        return self.slots, self.tokens, self.saved, self.pairs, self.scored


def forward_flops(sizes: Sizes, work: Work) -> int:
    """2 for each weight and token; for each pair, its score and its share of the sum of values; the head for scored tokens only."""
    return 2 * (sizes.linear + sizes.adapter) * work.tokens + 4 * sizes.attention * work.pairs + 2 * sizes.head * work.scored


def backward_flops(sizes: Sizes, work: Work) -> int:
    """Frozen weights and the head have a gradient with respect to their inputs only; the adapter and both factors of attention have two.

    Recomputation (gradient checkpointing) is not counted: it is no part of what a step needs. That nothing flows below the lowest adapter
    is neglected.
    """
    return (2 * sizes.linear + 4 * sizes.adapter) * work.tokens + 8 * sizes.attention * work.pairs + 2 * sizes.head * work.scored


def sizes_of(config: Mapping[str, Any], dims: Mapping[str, tuple[int, int]], parameters: int, adapter: int, max_length: int) -> Sizes | None:
    """Sizes of a model by its config.json, the (inputs, outputs) of its linear layers, and its number of parameters without the adapter.

    None unless linear layers, embeddings and head are all of it but 1 %, all tokens meet all of them, and attention is plain: with
    experts, convolutions, compressed keys or windows shorter than `max_length` the count would be another.
    """
    text = config.get("text_config") or config
    counts = [text.get(key) for key in ("hidden_size", "vocab_size", "num_attention_heads", "num_hidden_layers")]
    if not all(isinstance(n, int) and n > 0 for n in counts) or text.get("kv_lora_rank"):
        return None
    hidden, vocab, heads, layers = (int(n or 0) for n in counts)
    window = text.get("sliding_window")
    if any("expert" in path for path in dims) or (isinstance(window, int) and window < max_length and text.get("use_sliding_window") is not False):
        return None
    linear = sum(i * o for i, o in dims.values())
    if not any(abs(parameters - linear - tables * hidden * vocab) <= 0.01 * parameters for tables in (1, 2)):
        return None
    return Sizes(linear, adapter, layers * heads * (text.get("head_dim") or hidden // heads), hidden * vocab)


# Dense products in TFLOP/s, with float32 sums, not counting sparsity; float32 without TF32. NVIDIA: its data sheets and, for GeForce and RTX
# cards, the appendices of its architecture white papers (Ampere GA102, Ada, Blackwell). Apple names no number for later chips: M1 family and
# M2 by its announcements, the other M2 by cores * 128 lanes * 2 * 1.398 GHz; of the chip with all its GPU cores, 16 bits no faster than float32.
PEAKS: dict[str, dict[str, float]] = {
    **{
        name: {"bfloat16": sixteen, "float16": sixteen, "float32": full}
        for name, sixteen, full in (
            ("B200", 2250, 75), ("GH200", 989, 67), ("H200", 989, 67), ("H200 NVL", 835.5, 60), ("H100", 989, 67), ("H100 PCIe", 756, 51), ("H100 NVL", 835.5, 60),
            ("A100", 312, 19.5), ("A40", 149.7, 37.4), ("A30", 165, 10.3), ("A10", 125, 31.2), ("L40S", 362, 91.6), ("L40", 181, 90.5), ("L4", 121, 30.3),
            ("RTX A6000", 154.8, 38.7), ("RTX 6000 Ada", 364.2, 91.1), ("RTX 3090", 71, 35.6), ("RTX 4090", 165.2, 82.6), ("RTX 5090", 209.5, 104.8),
        )
    },
    "T4": {"float16": 65, "float32": 8.1},
    **{
        f"Apple {name}": dict.fromkeys(("bfloat16", "float16", "float32"), full)
        for name, full in (("M1", 2.6), ("M1 Pro", 5.2), ("M1 Max", 10.4), ("M1 Ultra", 21), ("M2", 3.6), ("M2 Pro", 6.8), ("M2 Max", 13.6), ("M2 Ultra", 27.2))
    },
}  # fmt: skip
OTHERS = {"laptop", "mig", "d", "super", "ti"}  # words of names whose card has less, or more, than the one named alike


def peak_flops(chip: str, dtype: str) -> float | None:
    """FLOP/s of a device by the name its driver gives, e.g. `NVIDIA H100 80GB HBM3`; None where it is not known."""
    words = chip.replace("-", " ").split()
    if OTHERS & {word.lower() for word in words}:
        return None
    name = f" {' '.join(words)} ".lower()
    known = [key for key in PEAKS if all(f" {part} " in name for part in (key.lower().split() if not key.startswith("Apple") else [key.lower()]))]
    best = max(known, key=len, default=None)
    peak = None if best is None else PEAKS[best].get(dtype)
    return None if peak is None else peak * 1e12
