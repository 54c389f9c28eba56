"""What makes two runs the same run: hashes of what went in, and the configuration keys that may not change on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from upo.config import RunConfig
from upo.data.order import epoch_order
from upo.errors import RunError
from upo.training.inputs import Inputs, rewards_difference, rows_difference
from upo.training.prepare import Prepared
from upo.training.reference import adapter_hash, reference_identity

# Where and how fast a run computes, and what it writes: free to change when it is resumed.
_COMPUTED = ("micro_batch_tokens", "gradient_checkpointing", "prefix_sharing", "memory_limit_gb", "cache_limit_gb", "wired_limit_gb")
_WRITTEN = ("eval_every", "save_every", "keep_checkpoints", "keep_best", "early_stopping")
FREE = frozenset(f"train.{key}" for key in (*_COMPUTED, *_WRITTEN)) | {"backend", "device", "dtype", "evaluation", "log"}  # of a section, all its keys
# Names of places: the contents behind them are compared by hash, so that a run can move to another machine.
PLACES = frozenset({"model", "revision", "data.train", "data.eval", "data.revision", "adapter.start", "reference"})
# What the learning rates of all steps follow from. Under a constant schedule the length is not among it.
LENGTH = frozenset({"train.epochs", "train.steps"})
SCHEDULE = LENGTH | {"optimizer.lr", "optimizer.schedule", "optimizer.warmup_steps"}
INSTEAD = "start a new run with adapter.start set to its adapter"


def run_identity(prepared: Prepared, inputs: Inputs) -> dict[str, str]:
    """Hashes of what a run is made of, but for the model itself."""
    config, train = prepared.config, prepared.config.train
    identity = {f"data.{split}": _sha256(inputs.rows.get(split, np.zeros(0, np.uint64)).astype("<u8")) for split in ("train", "eval")}
    if inputs.rewards:  # to six decimals: the last bits differ between platforms
        identity["rewards"] = hashlib.sha256(repr([[f"{r:.6f}" for r in inputs.rewards[s]] for s in sorted(inputs.rewards)]).encode()).hexdigest()
    partners = [np.asarray(p, "<i4") for e in (*prepared.train, *prepared.eval) for p in e.partners or ()]
    first = epoch_order(len(prepared.train), train.seed, 0).astype("<i8")
    identity["order"] = _sha256(first, np.array([len(p) for p in partners], "<i8"), *partners)
    if prepared.tokenizer is not None:
        identity["tokenizer"] = prepared.tokenizer.hash
    if "reference" in prepared.objective.needs:
        identity["reference"] = reference_identity(config)
    if config.adapter.start is not None:
        identity["adapter.start"] = adapter_hash(config.adapter.start)
    return identity


def position(prepared: Prepared, step: int) -> dict[str, int]:
    """Where in the order of the rows a run stands after `step` steps: whole epochs done, and rows of the one after them."""
    rows, train = len(prepared.train), prepared.config.train
    epoch, row = divmod(prepared.rows_before(step), rows)
    return {"seed": train.seed, "batch_size": train.batch_size, "rows": rows, "epoch": epoch, "row": row}


def check_config(old: RunConfig, new: RunConfig, folder: Path, reschedule: bool = False) -> dict[str, tuple[Any, Any]]:
    """Raise RunError showing every key that differs and may not. Returns those of the schedule that differ: {key: (before, now)}.

    The length may change under a constant schedule; every key of the schedule may with `reschedule`.
    """
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    differ = {key: (before.get(key), after.get(key)) for key in sorted({*before, *after}) if before.get(key) != after.get(key)}
    constant = old.optimizer.schedule == new.optimizer.schedule == "constant"
    allowed = SCHEDULE if reschedule else LENGTH if constant else frozenset[str]()
    changed = [key for key in differ if key not in PLACES | allowed and not is_free(key) and not key.startswith("reference.")]  # of several, each has a number
    if changed:
        shown = "; ".join(f"{key}: {differ[key][0]!r} in the run, {differ[key][1]!r} now" for key in changed)
        hint = (
            f" More or fewer steps need a constant schedule, or --reschedule, which computes the learning rates of the steps to come anew "
            f"({', '.join(sorted(SCHEDULE))})."
            if SCHEDULE.intersection(changed)
            else ""
        )
        raise RunError(
            f"--resume: {folder} was started with another configuration ({shown}). Only {', '.join(sorted(FREE))} may change.{hint} "
            f"Resume with the run's own config.yaml, or {INSTEAD}."
        )
    return {key: values for key, values in differ.items() if key in allowed}


def is_free(key: str) -> bool:
    """Whether a resumed run may have another value of this dotted key."""
    return any(key == name or key.startswith(f"{name}.") for name in FREE)


def with_keys(config: RunConfig, other: RunConfig, keys: Sequence[str]) -> RunConfig:
    """`config` with these keys as `other` has them."""
    mine, theirs = config.model_dump(mode="json"), other.model_dump(mode="json")
    for key in keys:
        section, _, name = key.partition(".")
        mine[section][name] = theirs[section][name]
    return RunConfig.model_validate(mine)


def check_identity(old: Mapping[str, str], new: Mapping[str, str], folder: Path, details: Mapping[str, str | None] | None = None) -> None:
    """Raise RunError saying what behind the configuration's names is not what the run was started with.

    `details` says in words how a part differs; without one the two hashes are shown.
    """
    changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if any(name.startswith("data.") for name in changed):  # other rows have another order and other rewards: that is no news
        changed = [name for name in changed if name not in ("order", "rewards")]
    if changed:
        hashes = {name: f"{str(old.get(name))[:12]} in the run, {str(new.get(name))[:12]} now" for name in changed}
        shown = "; ".join(f"{name}: {(details or {}).get(name) or hashes[name]}" for name in changed)
        raise RunError(
            f"--resume: the contents of {', '.join(changed)} are not those that {folder} was started with ({shown}). Restore them, or {INSTEAD}."
        )


def differences(old: Inputs, new: Inputs, prepared: Prepared) -> dict[str, str | None]:
    """How rows and rewards differ from those of the run, in words: None where that cannot be told, "" for rewards that differ by rounding only."""
    splits = {"train": prepared.train, "eval": prepared.eval}
    found = {f"data.{split}": rows_difference(old, new, split, rows) or None for split, rows in splits.items()}
    return {**found, "rewards": rewards_difference(old, new, splits)}


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """{"a.b.0.c": value} of nested mappings and lists."""
    items: list[tuple[str, Any]] | None = None
    if isinstance(data, Mapping):
        items = [(str(key), value) for key, value in data.items()]
    elif isinstance(data, (list, tuple)):
        items = [(str(i), value) for i, value in enumerate(data)]
    if items is None:
        return {prefix: data}
    return {k: v for key, value in items for k, v in flatten(value, f"{prefix}.{key}" if prefix else key).items()}


def _sha256(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
