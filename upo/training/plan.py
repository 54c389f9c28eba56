"""What a run would do, for `upo train --dry-run`: counted from the data and the model's file headers, no weight is loaded."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from upo.adapters import read_adapter
from upo.backend import choose, get_backend, installed
from upo.config import RunConfig
from upo.data.batch import Example, collate, micro_batches
from upo.data.forest import padded_size
from upo.errors import ConfigError, did_you_mean
from upo.memory import Choice, Estimate, Shapes, estimate, model_shapes
from upo.memory import choose as choose_memory
from upo.training.prepare import Prepared, prepare
from upo.training.reference import pass_size
from upo.training.reporter import Reporter, Silent


def plan(config: RunConfig, *, allow_code: bool = False, reporter: Reporter | None = None) -> dict[str, Any]:
    """Rows, tokens, steps, reference pass, adapter and estimated memory of a run. Checks what `train` checks before it loads a model.

    Rewards are not scored. Raises an UpoError.
    """
    reporter = reporter or Silent()
    if installed(choose(config.backend)):  # a plan can be made without
        get_backend(config.backend).check(config)
    prepared = prepare(config, allow_code=allow_code, reporter=reporter, score=False)
    assert prepared.folder is not None
    shapes = model_shapes(prepared.folder)
    adapter = adapter_parameters(config, shapes)
    choice, why = computing(config, shapes, adapter)
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
        "micro_batch_tokens": choice.tokens,
        "gradient_checkpointing": why,
        "memory_gb": memory(prepared, shapes, adapter, choice),
    }


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


def needs(config: RunConfig, shapes: Shapes, adapter: int, tokens: int, longest: int) -> Estimate:
    """`upo.memory.estimate` in the dtype that `auto` will be: 2 bytes on Apple silicon or where CUDA's driver is, else 4."""
    width = {"float32": 4, "auto": 2 if config.device != "cpu" and _has_gpu() else 4}.get(config.dtype, 2)
    return estimate(config, shapes, adapter, width, tokens, longest, choose(config.backend))


def memory(prepared: Prepared, shapes: Shapes, adapter: int, choice: Choice) -> dict[str, float]:
    """Estimated GB (1e9 bytes): base, adapter, activations of the largest micro-batch of padded rows, and their sum."""
    train = prepared.config.train
    tokens = largest_micro_batch(prepared.train, choice.tokens, train.batch_size)
    found = needs(prepared.config, shapes, adapter, tokens, max(len(e.prompt) + max(map(len, e.completions)) for e in prepared.train))
    parts = {"base": found.base, "adapter": found.adapter, "activations": found.recomputed if choice.recompute else found.activations}
    return {**{name: size / 1e9 for name, size in parts.items()}, "total": sum(parts.values()) / 1e9}


def computing(config: RunConfig, shapes: Shapes, adapter: int) -> tuple[Choice, str]:
    """Size of micro-batches and recomputation, as far as can be told before the model is loaded, and why."""
    train, name = config.train, choose(config.backend)
    here = installed(name)
    device, free = get_backend(name).free_memory(config.device) if here else ("cpu", float("inf"))
    choice = choose_memory(config, lambda tokens: needs(config, shapes, adapter, tokens, train.max_length), free, device)
    if train.gradient_checkpointing != "auto":
        return choice, "on" if choice.recompute else "off"
    return choice, choice.notes[0].rpartition("gradient_checkpointing: ")[2].rstrip(".") if here else f"decided when the model is loaded ({name} is not installed here)"


def _has_gpu() -> bool:
    """Whether `device: auto` will find a GPU, as far as can be told without loading a framework."""
    return (sys.platform == "darwin" and platform.machine() == "arm64") or shutil.which("nvidia-smi") is not None


def largest_micro_batch(examples: Sequence[Example], limit: int, batch_size: int) -> int:
    """Padded tokens of the largest micro-batch that a step of the longest rows makes."""
    longest = sorted(examples, key=lambda e: -e.tokens)[:batch_size]
    batch = collate(longest)
    sizes = [(len(e.prompt), [len(c) for c in e.completions]) for e in longest]
    return max(padded_size([sizes[r] for r in rows]) for rows in micro_batches(batch, limit))
