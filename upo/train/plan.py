"""What a run would do, for `upo train --dry-run`: counted from the data and the model's file headers, no weight is loaded."""

from __future__ import annotations

import math
import platform
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upo import models, tensors
from upo.adapters import read_adapter
from upo.backend import choose
from upo.config import RunConfig
from upo.data.batch import Example, collate, micro_batches
from upo.data.forest import padded_size
from upo.errors import ConfigError, did_you_mean
from upo.train.prepare import Prepared, prepare
from upo.train.reference import pass_size
from upo.train.reporter import Reporter, Silent

_LAYER = re.compile(r"\.(?:layers|h|blocks)\.\d+\.")


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model, read from its files' headers."""

    parameters: int
    stored: int  # bytes on disk
    linears: dict[str, tuple[int, int]]  # module path -> (inputs, outputs) of the decoder's linear layers
    hidden: int
    layers: int


def plan(config: RunConfig, *, allow_code: bool = False, reporter: Reporter | None = None) -> dict[str, Any]:
    """Rows, tokens, steps, reference pass, adapter and estimated memory of a run. Checks what `train` checks before it loads a model.

    Rewards are not scored. Raises an UpoError.
    """
    reporter = reporter or Silent()
    prepared = prepare(config, allow_code=allow_code, reporter=reporter, score=False)
    assert prepared.folder is not None
    shapes = model_shapes(prepared.folder)
    adapter = adapter_parameters(config, shapes)
    report = prepared.data.report
    auxiliary = prepared.objective.auxiliary
    tokens = sum(example.tokens for example in prepared.train)
    everything = [*prepared.train, *prepared.eval]
    reference = pass_size(prepared.config, everything) if "reference" in prepared.objective.needs else 0
    return {
        "backend": choose(config.backend),
        "rows": {"read": report.read, "train": len(prepared.train), "eval": len(prepared.eval), "dropped": report.read - len(everything)},
        "tokens": {"train": tokens, "per_row": tokens / len(prepared.train)},
        "steps": prepared.total,
        "epochs": prepared.rows_before(prepared.total) / len(prepared.train),
        "warmup_share": {
            "lr": min(1.0, config.optimizer.warmup_steps / prepared.total),
            "actor": 0.0 if auxiliary is None else auxiliary.actor_warmup_steps / prepared.total,
        },
        "reference_completions": reference,
        "parameters": {"base": shapes.parameters, "adapter": adapter},
        "memory_gb": memory(prepared, shapes, adapter),
    }


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
    return Shapes(
        parameters=parameters,
        stored=stored,
        linears=linears,
        hidden=int(text.get("hidden_size") or text.get("n_embd") or 0),
        layers=int(text.get("num_hidden_layers") or text.get("n_layer") or 0),
    )


def adapter_parameters(config: RunConfig, shapes: Shapes) -> int:
    """rank * (inputs + outputs) summed over the targeted layers, or the size of the adapter to start from."""
    if config.adapter.start is not None:
        return sum(array.size for array in read_adapter(config.adapter.start).arrays.values())
    targets = config.adapter.targets
    if targets == "all-linear":
        chosen = list(shapes.linears)
    else:
        wanted = [targets] if isinstance(targets, str) else list(targets)
        known = sorted({name.rpartition(".")[2] for name in shapes.linears})
        for target in wanted:
            if not _matching(target, shapes.linears):
                raise ConfigError(f'adapter.targets: the model has no linear layer "{target}".{did_you_mean(target, known)}')
        chosen = sorted({name for target in wanted for name in _matching(target, shapes.linears)})
    return sum(config.adapter.rank * sum(shapes.linears[name]) for name in chosen)


def _matching(target: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name == target or name.endswith(f".{target}")]


def memory(prepared: Prepared, shapes: Shapes, adapter: int) -> dict[str, float]:
    """Estimated GB (1e9 bytes): base, adapter, activations of the largest micro-batch, and their sum.

    base         parameters * bytes of the dtype (auto: 2 on Apple silicon or where CUDA's driver is, else 4); stored size for packed weights; half a byte each for nf4
    adapter      16 bytes per parameter: float32 master, gradient and two moments (12 with RMSprop)
    activations  T padded tokens: layers * T * 34 * hidden * bytes without checkpointing (Korthikanti et al. 2022, arXiv 2205.05198, eq. 2,
                 without dropout masks and attention scores); with it (layers + 34) * T * hidden * bytes
    """
    config = prepared.config
    width = {"float32": 4, "auto": 2 if config.device != "cpu" and _has_gpu() else 4}.get(config.dtype, 2)
    packed = shapes.stored < 1.5 * shapes.parameters and shapes.parameters > 0
    base = shapes.stored if packed else 0.5 * shapes.parameters if config.quantize == "nf4" else width * shapes.parameters
    tokens = largest_micro_batch(prepared.train, config.train.micro_batch_tokens, config.train.batch_size)
    kept = shapes.layers + 34 if config.train.gradient_checkpointing else 34 * shapes.layers
    parts = {
        "base": base / 1e9,
        "adapter": (16 if config.optimizer.name == "adamw" else 12) * adapter / 1e9,
        "activations": kept * tokens * shapes.hidden * width / 1e9,
    }
    return {**parts, "total": sum(parts.values())}


def _has_gpu() -> bool:
    """Whether `device: auto` will find a GPU, as far as can be told without loading a framework."""
    return (sys.platform == "darwin" and platform.machine() == "arm64") or shutil.which("nvidia-smi") is not None


def largest_micro_batch(examples: Sequence[Example], limit: int, batch_size: int) -> int:
    """Padded tokens of the largest micro-batch that a step of the longest rows makes."""
    longest = sorted(examples, key=lambda e: -e.tokens)[:batch_size]
    batch = collate(longest)
    sizes = [(len(e.prompt), [len(c) for c in e.completions]) for e in longest]
    return max(padded_size([sizes[r] for r in rows]) for rows in micro_batches(batch, limit))
