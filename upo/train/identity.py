"""What makes two runs the same run: hashes of what went in, and the configuration keys that may not change on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from upo.config import RunConfig
from upo.data.batch import Example
from upo.errors import RunError
from upo.train.prepare import Prepared
from upo.train.reference import reference_identity

# Where and how fast a run computes, and what it writes: free to change when it is resumed.
FREE = frozenset(
    f"train.{key}" for key in ("micro_batch_tokens", "gradient_checkpointing", "eval_every", "save_every", "keep_checkpoints")
) | {"backend", "device", "dtype"}
# Names of places: the contents behind them are compared by hash, so that a run can move to another machine.
PLACES = frozenset({"model", "revision", "data.train", "data.eval", "data.revision", "adapter.start", "reference"})


def run_identity(prepared: Prepared) -> dict[str, str]:
    """Hashes of what a run is made of, but for the model itself."""
    identity = {"data.train": rows_hash(prepared.train), "data.eval": rows_hash(prepared.eval)}
    if prepared.objective.auxiliary is not None:
        identity["rewards"] = rewards_hash(prepared.train)
    if prepared.tokenizer is not None:
        identity["tokenizer"] = prepared.tokenizer.hash
    if "reference" in prepared.objective.needs:
        identity["reference"] = reference_identity(prepared.config)
    return identity


def rows_hash(examples: Sequence[Example]) -> str:
    """SHA-256 over the tokens and labels of rows, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.kind}{example.labels}".encode())
        for tokens in (example.prompt, *example.completions):
            digest.update(len(tokens).to_bytes(8, "little") + np.asarray(tokens, "<i4").tobytes())
    return digest.hexdigest()


def rewards_hash(examples: Sequence[Example]) -> str:
    """SHA-256 over the auxiliary rewards of rows, to six decimals: the last bits differ between platforms."""
    return hashlib.sha256(repr([None if e.reward is None else [f"{r:.6f}" for r in e.reward] for e in examples]).encode()).hexdigest()


def check_config(old: RunConfig, new: RunConfig, folder: Path) -> None:
    """Raise RunError showing every key that differs and may not."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    changed = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key) and key not in FREE | PLACES]
    if changed:
        shown = "; ".join(f"{key}: {before.get(key)!r} in the run, {after.get(key)!r} now" for key in changed)
        raise RunError(
            f"--resume: {folder} was started with another configuration ({shown}). Only {', '.join(sorted(FREE))} may change. "
            "Resume with the run's own config.yaml, or start a new run with adapter.start set to its adapter."
        )


def check_identity(old: Mapping[str, str], new: Mapping[str, str], folder: Path) -> None:
    """Raise RunError naming what is behind the configuration's names and is not what the run was started with."""
    changed = [name for name in new if name in old and old[name] != new[name]]
    if changed:
        shown = "; ".join(f"{name}: {old[name][:12]} in the run, {new[name][:12]} now" for name in changed)
        raise RunError(
            f"--resume: the contents of {', '.join(changed)} are not those that {folder} was started with (by hash, {shown}). "
            "Restore them, or start a new run with adapter.start set to this run's adapter."
        )


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
