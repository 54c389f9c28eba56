"""Reference log-probs: scored once per row, kept on disk under a key that names everything they depend on."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from upo.adapters import read_adapter
from upo.backend import Comm, Learner, ModelInfo
from upo.cache import cache_dir
from upo.config import RunConfig
from upo.data.batch import Batch, Example, collate, micro_batches
from upo.errors import ModelError
from upo.train.metrics import bad_rows, name_rows
from upo.train.reporter import Reporter

LAYOUT = "padded"  # policy and reference are scored in one layout; another layout is another key


@dataclass(frozen=True)
class Reference:
    """Rows with their reference log-probs, and how they were come by."""

    examples: list[Example]
    key: str
    cached: bool


def check_reference(config: RunConfig) -> None:
    """Raise ModelError for an adapter that cannot be read."""
    for option, folder in (("adapter.start", config.adapter.start), ("reference", _folder(config))):
        if folder is not None:
            try:
                read_adapter(folder)
            except ModelError as error:
                known = " Known besides folders: base, start." if option == "reference" else ""
                raise ModelError(f"{option}: {error}{known}") from None


def reference_identity(config: RunConfig) -> str:
    """`base`, or the hash of the adapter that serves as reference: equal wherever the folder lies."""
    folder = _folder(config)
    return "base" if folder is None else adapter_hash(folder)


def adapter_hash(folder: str) -> str:
    """SHA-256 over what an adapter computes: its scale and its arrays."""
    adapter = read_adapter(folder)
    digest = hashlib.sha256(repr(adapter.scale).encode())
    for name, array in sorted(adapter.arrays.items()):
        digest.update(f"{name}{array.shape}".encode() + np.ascontiguousarray(array, "<f4").tobytes())
    return digest.hexdigest()


def reference_key(config: RunConfig, info: ModelInfo, backend: str, examples: Sequence[Example]) -> str:
    """Names the log-probs of these rows: weights, reference adapter, number formats, kind of device, layout and every token."""
    digest = hashlib.sha256()
    parts = (info.weights_hash, reference_identity(config), config.quantize, info.dtype, backend, info.device.split(":")[0], LAYOUT)
    digest.update(repr(parts).encode())
    for example in examples:
        for tokens in (example.prompt, *_completions(example)):
            digest.update(len(tokens).to_bytes(8, "little") + np.asarray(tokens, "<i4").tobytes())
        digest.update(b"|")
    return digest.hexdigest()


def with_reference(config: RunConfig, learner: Learner, backend: str, examples: Sequence[Example], name: str, reporter: Reporter) -> Reference:
    """The rows with `ref_logp` and `partner_ref_logp`, from the cache where it has them, else by one pass over all ranks.

    `name` is the split's, for messages. Rank 0 reads and writes the cache. Raises ModelError naming rows whose log-prob is not finite.
    """
    key = reference_key(config, learner.info, backend, examples)
    path, size = cache_path(key), pass_size(examples)
    logp = _shared(learner.comm, read_cached(path, size) if learner.comm.rank == 0 else None, size)
    cached = logp is not None
    if logp is None:
        logp = _score(learner, collate(examples), config.train.micro_batch_tokens, name, reporter)
        if learner.comm.rank == 0:
            _write(path, logp)
    return Reference(_attach(examples, logp), key, cached)


def cache_path(key: str) -> Path:
    """Where the log-probs of a key are kept: one float32 array, all rows' completions, then all rows' partners."""
    return cache_dir("reference") / f"{key}.npy"


def pass_size(examples: Sequence[Example]) -> int:
    """Completions that the pass scores, KTO's partners included."""
    return sum(len(_completions(e)) for e in examples)


def logps_of(examples: Sequence[Example]) -> np.ndarray:
    """[completions and partners] the reference log-probs that rows carry, in the order of the cache."""
    return np.array([v for name in ("ref_logp", "partner_ref_logp") for e in examples for v in getattr(e, name) or ()], np.float32)


def _folder(config: RunConfig) -> str | None:
    return {"base": None, "start": config.adapter.start}.get(config.reference, config.reference)


def _completions(example: Example) -> tuple[np.ndarray, ...]:
    return (*example.completions, *(example.partners or ()))


def _score(learner: Learner, batch: Batch, limit: int, name: str, reporter: Reporter) -> np.ndarray:
    """[N] log-probs of the batch's completions, then [N] of its partners if it has them; rank r takes parts r, r + W, ...

    The parts are those in which `evaluate` scores the policy, completions and partners apart as there: in equal shapes policy and
    reference round alike, so that they agree to the last bit before the first update.
    """
    comm, n = learner.comm, len(batch.label)
    logp = np.zeros(n if batch.partners is None else 2 * n, np.float32)
    reporter.start(f"reference ({name})", len(batch.origins), "rows")
    for rows in micro_batches(batch, limit, at_least=comm.size)[comm.rank :: comm.size]:
        part, kept = batch.select(rows)
        logp[kept] = learner.logps(part.forest, reference=True)
        if part.partners is not None:
            logp[n + kept] = learner.logps(part.partners, reference=True)
        reporter.advance(min(len(rows) * comm.size, len(batch.origins)))
    logp = comm.all_sum(logp)
    bad = bad_rows(batch, logp.reshape(-1, n).sum(axis=0))
    if bad:
        remedy = "Use dtype: float32 or bfloat16." if learner.info.dtype == "float16" else "The model or the reference adapter is damaged."
        raise ModelError(f"reference: log-probs that are not finite ({learner.info.dtype}) in {name_rows(bad)}. {remedy}")
    return logp


def _attach(examples: Sequence[Example], logp: np.ndarray) -> list[Example]:
    done, n, place = [], sum(len(e.completions) for e in examples), 0
    for example in examples:
        here = slice(place, place + len(example.completions))
        partners = None if example.partners is None else tuple(logp[n:][here].tolist())
        done.append(replace(example, ref_logp=tuple(logp[here].tolist()), partner_ref_logp=partners))
        place = here.stop
    return done


def _shared(comm: Comm, found: np.ndarray | None, size: int) -> np.ndarray | None:
    """What rank 0 found, on every rank; adding zeros changes no bit."""
    if comm.size == 1:
        return found
    if comm.all_sum(np.array([0.0 if found is None else 1.0], np.float32))[0] == 0:
        return None
    return comm.all_sum(np.zeros(size, np.float32) if found is None else found)


def read_cached(path: Path, size: int) -> np.ndarray | None:
    """The array, or None where it is missing, unreadable or of another size: then it is made again."""
    try:
        logp = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return logp if logp.shape == (size,) and logp.dtype == np.float32 and np.isfinite(logp).all() else None


def _write(path: Path, logp: np.ndarray) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, logp, allow_pickle=False)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
