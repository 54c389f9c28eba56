"""What a run learns from, row by row, in a file small enough to travel with it: then another machine can say what differs, and by how much."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from upo import tensors
from upo.data.batch import Example
from upo.errors import ModelError

NAME = "inputs.safetensors"
SAME_REWARD = 1e-5  # scorers of floating point differ in the last bits between platforms


@dataclass(frozen=True)
class Inputs:
    """Per split ("train", "eval"), in the order of its rows."""

    rows: dict[str, np.ndarray] = field(default_factory=dict)  # [R] uint64, the first 8 bytes of each row's SHA-256
    rewards: dict[str, np.ndarray] = field(default_factory=dict)  # [N] float64, where there are auxiliary rewards
    reference: dict[str, np.ndarray] = field(default_factory=dict)  # [completions and partners] float32 log-probs, once they are scored


def inputs_of(train: Sequence[Example], held_out: Sequence[Example], columns: Sequence[str] = ()) -> Inputs:
    """Rows, with those of their numeric columns that losses use, and rewards; a split without rows is left out."""
    found = Inputs()
    for split, examples in (("train", train), ("eval", held_out)):
        if not examples:
            continue
        found.rows[split] = np.array([int.from_bytes(row_hash(e, columns)[:8], "little") for e in examples], np.uint64)
        if any(e.reward is not None for e in examples):
            found.rewards[split] = np.array([r for e in examples for r in e.reward or ()], np.float64)
    return found


def row_hash(example: Example, columns: Sequence[str] = ()) -> bytes:
    """SHA-256 over what a row brings: labels, these columns, rewards of the reference's answers, and all its tokens."""
    numbers = [example.columns.get(name) for name in columns]
    digest = hashlib.sha256(repr((example.kind, example.labels, numbers, example.ref_rewards)).encode())
    for tokens in (example.prompt, *example.completions, *(() if example.anchor is None else (example.anchor,))):
        digest.update(len(tokens).to_bytes(8, "little") + np.asarray(tokens, "<i4").tobytes())
    return digest.digest()


def write_inputs(folder: Path, inputs: Inputs) -> None:
    """Write them into a run's folder at once."""
    parts = {"rows": inputs.rows, "rewards": inputs.rewards, "reference": inputs.reference}
    tensors.write(folder / NAME, {f"{part}.{split}": array for part, arrays in parts.items() for split, array in arrays.items()})


def read_inputs(folder: Path) -> Inputs:
    """Those of a run; empty where the file is missing or damaged: it serves to explain, what must be equal is compared by hash."""
    try:
        arrays = tensors.read(folder / NAME)
    except ModelError:
        return Inputs()
    found = Inputs()
    for name, array in arrays.items():
        part, _, split = name.partition(".")
        kinds = {"rows": (found.rows, np.uint64), "rewards": (found.rewards, np.float64), "reference": (found.reference, np.float32)}
        if part in kinds and array.ndim == 1 and array.dtype == kinds[part][1]:
            kinds[part][0][split] = array
    return found


def rows_difference(old: Inputs, new: Inputs, split: str, examples: Sequence[Example]) -> str:
    """In words, how the rows of a split differ; empty where the run did not note them."""
    if not old.rows:
        return ""
    before, now = (inputs.rows.get(split, np.zeros(0, np.uint64)) for inputs in (old, new))
    if len(before) == len(now) and Counter(before.tolist()) == Counter(now.tolist()):
        counts = f"the same {len(now)} rows in another order"
    elif len(before) != len(now):
        counts = f"{len(before)} rows in the run, {len(now)} now"
    else:
        counts = f"{int(np.sum(before != now))} of {len(now)} rows"
    common = min(len(before), len(now))
    first = next(iter(np.flatnonzero(before[:common] != now[:common]).tolist()), common)
    return f"{counts}, from {examples[first].origin} on" if first < len(examples) else counts


def rewards_difference(old: Inputs, new: Inputs, splits: Mapping[str, Sequence[Example]]) -> str | None:
    """In words, how auxiliary rewards differ: empty if by rounding only, None if they cannot be compared."""
    if not new.rewards or _shapes(old.rewards) != _shapes(new.rewards):
        return None
    for split, now in new.rewards.items():
        apart = np.abs(old.rewards[split] - now)
        far = np.flatnonzero(apart > SAME_REWARD)
        if len(far):
            origins = [e.origin for e in splits[split] for _ in e.reward or ()]
            return f"{len(far)} of {len(now)} differ, by up to {apart.max():.3g}, from {origins[far[0]]} on"
    return ""


def _shapes(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {split: array.shape for split, array in arrays.items()}
