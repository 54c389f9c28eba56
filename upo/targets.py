"""Where an adapter sits and what it starts with: decided here from the shapes of a model's linear layers, equal on every backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from upo import adapters, random
from upo.adapters import Adapter, lora_name
from upo.config import AdapterConfig, RunConfig
from upo.errors import ConfigError, ModelError

Dims = Mapping[str, tuple[int, int]]  # path of each linear layer of the decoder -> (inputs, outputs)


def policy_adapter(config: RunConfig, dims: Dims) -> tuple[Adapter, list[str]]:
    """The adapter to train, and notes: a fresh one (A seeded, B = 0), or `adapter.start` with its own rank, alpha and targets.

    Raises ModelError if the start adapter does not fit the model, or has not what the configuration asks for.
    """
    wanted = config.adapter
    if wanted.start is None:
        targets = tuple(expand_targets(dims, wanted.targets))
        arrays = fresh_arrays(dims, targets, wanted.rank, config.train.seed)
        return Adapter(wanted.rank, wanted.alpha, wanted.alpha / wanted.rank, targets, arrays, config.model, {}), []
    start = adapters.read_adapter(wanted.start)
    check_fits(dims, start, "adapter.start")
    if different := _differences(wanted, dims, start):
        raise ModelError(
            f"adapter.{different[0]}: differs from that of adapter.start ({wanted.start}: rank {start.rank}, alpha {start.alpha:g}, "
            f"{len(start.targets)} layers). Leave {', '.join(different)} out: a run goes on with what its start adapter has."
        )
    return start, [f"adapter: rank {start.rank}, scale {start.scale:g} and {len(start.targets)} layers, as in {wanted.start}"]


def reference_adapters(config: RunConfig, dims: Dims, policy: Adapter) -> list[Adapter | None]:
    """Each reference's adapter: None for `base`, the policy's own beginning for `start`, or the one in a folder."""
    return [_reference_adapter(name, config, dims, policy) for name in config.references]


def _reference_adapter(name: str, config: RunConfig, dims: Dims, policy: Adapter) -> Adapter | None:
    if name == "base":
        return None
    if name == "start":
        if config.adapter.start is None:
            raise ConfigError("reference: `start` is the adapter the run starts from, but adapter.start is not given. Use `base`, or give adapter.start.")
        return policy
    reference = adapters.read_adapter(name)
    check_fits(dims, reference, "reference")
    return reference


def expand_targets(dims: Dims, targets: str | Sequence[str]) -> list[str]:
    """Paths of the linear layers to adapt. `all-linear`: every one of the decoder; else names that paths end in.

    Raises ModelError for a name that fits nothing, with what there is.
    """
    names = [targets] if isinstance(targets, str) else list(targets)
    if not dims:
        raise ModelError("adapter.targets: this model has no linear layer that could carry an adapter. Use another model.")
    if names == ["all-linear"]:
        return list(dims)
    fits = {name: [path for path in dims if path == name or path.endswith(f".{name}")] for name in names}
    if unknown := sorted(name for name, paths in fits.items() if not paths):
        there = sorted({path.rpartition(".")[2] for path in dims})
        raise ModelError(f"adapter.targets: no linear layer of this model is called {', '.join(unknown)}. There are: {', '.join(there)}.")
    return [path for path in dims if any(path in paths for paths in fits.values())]


def check_fits(dims: Dims, adapter: Adapter, key: str) -> None:
    """Raise ModelError, starting with the config key, unless every array of an adapter has its linear layer, of its shape."""
    if unknown := sorted(set(adapter.targets) - set(dims)):
        raise ModelError(f"{key}: the adapter has weights for {some(unknown)}, which this model does not have. Was it trained on another model?")
    for path in adapter.targets:
        shape = (adapter.arrays[lora_name(path, "A")].shape[1], adapter.arrays[lora_name(path, "B")].shape[0])
        if shape != dims[path]:
            raise ModelError(f"{key}: the adapter's {path} is for a layer of {shape} (in, out); this model's is {dims[path]}. Was it trained on another model?")


def fresh_arrays(dims: Dims, paths: Sequence[str], rank: int, seed: int) -> dict[str, np.ndarray]:
    """Initial A [rank, in], seeded by its PEFT name, and B = 0 [out, rank] for these layers."""
    arrays = {}
    for path in paths:
        inputs, outputs = dims[path]
        name = lora_name(path, "A")
        arrays[name] = random.lora_a(rank, inputs, seed, name)
        arrays[lora_name(path, "B")] = np.zeros((outputs, rank), np.float32)
    return arrays


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _differences(wanted: AdapterConfig, dims: Dims, start: Adapter) -> list[str]:
    """Options that ask for something else than the start adapter has; a default does not ask, even where a saved configuration spells it out."""
    default = AdapterConfig()
    asked = [key for key in ("rank", "alpha", "targets") if getattr(wanted, key) != getattr(default, key)]
    has = {"rank": start.rank, "alpha": start.alpha, "targets": sorted(start.targets)}
    wants = {"rank": wanted.rank, "alpha": wanted.alpha, "targets": sorted(expand_targets(dims, wanted.targets)) if "targets" in asked else None}
    return [key for key in asked if wants[key] != has[key]]
