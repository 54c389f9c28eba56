"""What a run needs in memory, from the model's file headers, and what the machine has: the size of micro-batches and whether activations are
recomputed follow from both."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from upo import models, tensors
from upo.backend import Comm
from upo.config import RunConfig, TrainConfig
from upo.data.batch import FEW_TOKENS

_LAYER = re.compile(r"\.(?:layers|h|blocks)\.\d+\.")
HEAD = 3 * 4 * 2**24  # the logits of a chunk (`logps.CHUNK_ELEMENTS`) in float32, and two arrays of their size made from them
BY_HAND = 10  # bytes for each attention score where there is no fused kernel: two float32 arrays and one of the dtype

# Of what is free, what a run may take. The rest is for what is not counted and, on a CPU, for the C library's heap: where a step's live
# arrays were 1.5 GB, glibc held 2.6 (SmolLM2-135M, 1024 tokens).
SHARE = {"cpu": 0.5}
SHARE_GPU = 0.8


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model, read from its files' headers and config.json."""

    parameters: int
    stored: int  # bytes on disk
    linears: dict[str, tuple[int, int]]  # module path -> (inputs, outputs) of the decoder's linear layers
    hidden: int
    layers: int
    heads: int
    queries: int  # heads * size of a head
    keys: int  # key heads * size of a head
    inner: int  # width of the MLP; of a mixture, of the experts that one token goes through
    capped: bool  # attention scores with a soft cap or sinks, which torch computes by hand

    @property
    def packed(self) -> bool:
        """Whether the weights are stored in fewer than 16 bits."""
        return 0 < self.stored < 1.5 * self.parameters


def model_shapes(folder: Path) -> Shapes:
    """Sizes of the model in a folder. Packed weights (4 bit, MLX) are counted as what they unpack to."""
    config, _ = models.model_config(folder)
    text = config.get("text_config") or config
    entries = {name: entry for path in models.weight_files(folder) for name, entry in tensors.read_header(path).entries.items()}
    bits = (config.get("quantization") or {}).get("bits", 32)
    parameters, stored = 0, 0
    linears: dict[str, tuple[int, int]] = {}
    for name, entry in entries.items():
        stored += entry.end - entry.begin
        packed = entry.dtype == "U32"
        shape = (*entry.shape[:-1], entry.shape[-1] * 32 // bits) if packed and entry.shape else entry.shape
        if not name.endswith((".scales", ".biases")):
            parameters += math.prod(shape)
        if name.endswith(".weight") and len(shape) == 2 and _LAYER.search(name):
            linears[name.removesuffix(".weight")] = (shape[1], shape[0])

    def size(*keys: str) -> int:
        found = next((text[key] for key in keys if text.get(key)), 0)
        return int(max(found) if isinstance(found, list) else found)  # one for each layer (Gemma 3n)

    hidden, heads = size("hidden_size", "n_embd", "d_model"), size("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads") or 1
    head, experts = size("head_dim", "v_head_dim") or hidden // heads, size("num_experts_per_tok", "moe_k")
    width = size("intermediate_size", "n_inner") or 4 * hidden
    return Shapes(
        parameters=parameters,
        stored=stored,
        linears=linears,
        hidden=hidden,
        layers=size("num_hidden_layers", "n_layer") or len({found.group() for name in linears if (found := _LAYER.search(name))}),
        heads=heads,
        queries=heads * head,
        keys=(size("num_key_value_heads") or heads) * head,
        inner=max(width, experts * (size("moe_intermediate_size") or width)),
        capped=bool(size("attn_logit_softcapping")) or text.get("model_type") == "gpt_oss",
    )


@dataclass(frozen=True)
class Estimate:
    """Bytes that a run takes: the base, its adapter with optimizer, and what a micro-batch leaves for its backward pass."""

    base: float
    adapter: float
    activations: float  # all kept
    recomputed: float  # each layer's input kept

    def total(self, recompute: bool) -> float:
        return self.base + self.adapter + (self.recomputed if recompute else self.activations)


def estimate(config: RunConfig, shapes: Shapes, adapter: int, width: int, tokens: int, longest: int, backend: str) -> Estimate:
    """What training takes with `width` bytes per element, in micro-batches of `tokens` token slots in texts of up to `longest` tokens.

    base         parameters * width; the stored size of packed weights; half a byte each for nf4
    adapter      16 bytes per parameter: float32 master, gradient and two moments (12 with RMSprop)
    activations  a token leaves in each layer, H hidden, q queries, k keys, I inner: float32 inputs of two norms 2 H; in the base's dtype
                 their outputs 2 H, queries, keys, values and what attention makes of them 3 q + 2 k, of the MLP gate, its activation, up
                 and their product 4 I. Frozen linear layers keep nothing, adapted ones their inputs, which are among these. Attention
                 scores only where no fused kernel has a backward pass: on MLX, and on torch with a soft cap or sinks.
    recomputed   a layer's input for each layer, and the activations of one layer
    Both also hold the hidden states and their gradient, and the logits of a chunk.
    """
    base = shapes.stored if shapes.packed else 0.5 * shapes.parameters if config.quantize == "nf4" else width * shapes.parameters
    scores = width if backend == "mlx" else BY_HAND if shapes.capped else 0
    token = 2 * shapes.hidden * 4 + (2 * shapes.hidden + 3 * shapes.queries + 2 * shapes.keys + 4 * shapes.inner) * width
    layer = tokens * (token + shapes.heads * longest * scores)
    ends = HEAD + 3 * tokens * shapes.hidden * width
    return Estimate(
        base=base,
        adapter=(16 if config.optimizer.name == "adamw" else 12) * adapter,
        activations=shapes.layers * layer + ends,
        recomputed=shapes.layers * tokens * shapes.hidden * width + layer + ends,
    )


# --- The choice -----------------------------------------------------------------------------------------------------------------------

# Token slots of a micro-batch that are tried on CUDA, where the layers of a small model wait for their launch (measured on an H200,
# SmolLM2-135M: 16384 are 8 times as fast as 2048) and large ones are idle with few.
MANY_TOKENS = (65536, 32768, 16384, 8192, 4096, FEW_TOKENS)


@dataclass(frozen=True)
class Choice:
    """How a run computes: `train.micro_batch_tokens` and `train.gradient_checkpointing`, decided, and what to say about it."""

    tokens: int
    recompute: bool
    notes: tuple[str, ...] = ()


def choose(config: RunConfig, needs: Callable[[int], Estimate], free: float, device: str, comm: Comm | None = None, unable: str | None = None) -> Choice:
    """What `auto` stands for: the most tokens at which all activations fit, or at which they fit when recomputed.

    `needs`: the estimate for micro-batches of so many token slots. `free`: bytes free on the device before the model is there. `unable`: why
    this model cannot recompute. The same on every rank (collective).
    """
    train, share = config.train, SHARE.get(device, SHARE_GPU)
    limit = math.inf if train.memory_limit_gb is None else train.memory_limit_gb * 1e9
    sizes = (train.micro_batch_tokens,) if train.micro_batch_tokens != "auto" else MANY_TOKENS if device == "cuda" else (FEW_TOKENS,)
    ways = (train.gradient_checkpointing,) if train.gradient_checkpointing != "auto" else (False,) if unable else (False, True)
    options = [(tokens, recompute) for recompute in ways for tokens in sizes]
    total = lambda tokens, recompute: needs(max(tokens, 2 * train.max_length)).total(recompute)  # a pair of the longest texts is not divided  # noqa: E731
    mine = next((i for i, option in enumerate(options) if total(*option) <= share * min(free, limit)), len(options) - 1)
    agreed = mine
    if comm is not None:
        agreed = int(np.flatnonzero(comm.all_sum(np.eye(len(options), dtype=np.float32)[mine]))[-1])
    tokens, recompute = options[agreed]
    figures = [f"about {_gb(total(tokens, recompute))}{f' instead of {_gb(total(tokens, False))}' if recompute else ''}"]
    room = f"{_gb(free)} free" if free <= limit else f"{_gb(limit)} by train.memory_limit_gb"
    figures += [f"{room}, of which {share:.0%} may be taken"] + ["another rank has less"] * (agreed != mine)
    return Choice(tokens, recompute, _notes(train, tokens if len(sizes) > 1 else None, recompute, unable, figures))


def _notes(train: TrainConfig, tokens: int | None, recompute: bool, unable: str | None, figures: Sequence[str]) -> tuple[str, ...]:
    """A sentence on what was decided, with its reasons; none where the configuration left nothing open. `tokens`: None if those were given."""
    said = [] if tokens is None else [f"train.micro_batch_tokens: {tokens}"]
    reasons = list(figures)
    if train.gradient_checkpointing == "auto":
        said.append(f"train.gradient_checkpointing: {'on' if recompute else 'off'}")
        reasons = [*([unable] if unable else []), *reasons]
    return (f"{', '.join(said)} ({'; '.join(reasons)}).",) if said else ()


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def decided(config: RunConfig, choice: Choice) -> RunConfig:
    """The configuration with numbers and switches in place of `auto`."""
    update = {"micro_batch_tokens": choice.tokens, "gradient_checkpointing": choice.recompute}
    return config.model_copy(update={"train": config.train.model_copy(update=update)})


# --- What the machine has -------------------------------------------------------------------------------------------------------------


def available(root: Path = Path("/")) -> int:
    """Bytes of main memory that a process can still get, its control group's limit included; where the system does not say, all there is."""
    try:
        lines = dict(line.split(":") for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):  # macOS
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([free, *_group_limits(root)])


def _group_limits(root: Path) -> list[int]:
    """What is left of the limits of this process's control group and of those it lies in. Cached files give way, so they do not count."""
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return []
    left = []
    for _, controllers, path in groups:
        if controllers not in ("", "memory"):
            continue
        version = ("", "memory.max", "memory.current") if not controllers else ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
        top = root / "sys/fs/cgroup" / version[0]
        folder = top / path.strip("/")
        for place in (folder, *folder.parents):
            if place.is_relative_to(top):
                left += _left(place, *version[1:])
    return left


def _left(folder: Path, limit: str, used: str) -> list[int]:
    read: Callable[[str], str] = lambda name: (folder / name).read_text(encoding="ascii")  # noqa: E731
    try:
        most, now, numbers = read(limit).strip(), int(read(used)), dict(line.split() for line in read("memory.stat").splitlines())
        return [] if most == "max" else [max(0, int(most) - now + int(numbers.get("total_inactive_file", numbers.get("inactive_file", 0))))]
    except (OSError, ValueError):
        return []
