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
from upo.learner import sum_over_ranks
from upo.train.metrics import name_rows
from upo.train.reporter import Reporter


@dataclass(frozen=True)
class Reference:
    """Rows with their reference log-probs, and how they were come by."""

    examples: list[Example]
    key: str
    cached: bool


def check_reference(config: RunConfig) -> None:
    """Raise ModelError for an adapter that cannot be read."""
    folders = [("adapter.start", config.adapter.start), *(("reference", _folder(config, name)) for name in config.references)]
    for option, folder in folders:
        if folder is not None:
            try:
                read_adapter(folder)
            except ModelError as error:
                known = " Known besides folders: base, start." if option == "reference" else ""
                raise ModelError(f"{option}: {error}{known}") from None


def reference_identity(config: RunConfig) -> str:
    """`base`, or the hash of the adapter that serves as reference, equal wherever the folder lies; of several, all of them."""
    folders = [_folder(config, name) for name in config.references]
    return ", ".join("base" if folder is None else adapter_hash(folder) for folder in folders)


def adapter_hash(folder: str) -> str:
    """SHA-256 over what an adapter computes: its scale and its arrays."""
    adapter = read_adapter(folder)
    digest = hashlib.sha256(repr(adapter.scale).encode())
    for name, array in sorted(adapter.arrays.items()):
        digest.update(f"{name}{array.shape}".encode() + np.ascontiguousarray(array, "<f4").tobytes())
    return digest.hexdigest()


def reference_key(config: RunConfig, info: ModelInfo, backend: str, examples: Sequence[Example]) -> str:
    """Names the log-probs of these rows: weights, references, number formats, kind of device, layout and every token."""
    digest = hashlib.sha256()
    parts = (info.weights_hash, reference_identity(config), config.quantize, info.dtype, backend, info.device.split(":")[0], info.layout)
    digest.update(repr((*parts, "tokens") if _by_token(config) else parts).encode())
    for example in examples:
        for tokens in (example.prompt, *_completions(example)):
            digest.update(len(tokens).to_bytes(8, "little") + np.asarray(tokens, "<i4").tobytes())
        digest.update(b"|")
    return digest.hexdigest()


def with_reference(config: RunConfig, learner: Learner, backend: str, examples: Sequence[Example], name: str, reporter: Reporter) -> Reference:
    """The rows with what the objective needs of the references, from the cache where it has them, else by one pass over all ranks.

    `name` is the split's, for messages. Rank 0 reads and writes the cache. Raises ModelError naming rows whose log-prob is not finite.
    """
    key, batch = reference_key(config, learner.info, backend, examples), collate(examples)
    vectors = _vectors(batch, len(config.references), _by_token(config))
    path, size = cache_path(key), sum(map(len, vectors.values()))
    found = _shared(learner.comm, read_cached(path, size) if learner.comm.rank == 0 else None, size)
    cached = found is not None
    if found is not None:
        vectors = dict(zip(vectors, np.split(found, np.cumsum([len(v) for v in vectors.values()])[:-1]), strict=True))
    else:
        vectors = _score(config, learner, batch, vectors, name, reporter)
        if learner.comm.rank == 0:
            _write(path, np.concatenate(list(vectors.values())))
    return Reference(_attach(examples, vectors), key, cached)


def cache_path(key: str) -> Path:
    """Where the log-probs of a key are kept: one float32 array."""
    return cache_dir("reference") / f"{key}.npy"


def pass_size(config: RunConfig, examples: Sequence[Example]) -> int:
    """Completions that the pass scores: KTO's partners and anchors under the first reference, the rows' own under each."""
    further = len(config.references) - 1
    return sum(len(_completions(e)) + further * len(e.completions) for e in examples)


def logps_of(examples: Sequence[Example]) -> np.ndarray:
    """[completions and partners] the (first) reference's log-probs that rows carry."""
    return np.array([v for name in ("ref_logp", "partner_ref_logp") for e in examples for v in getattr(e, name) or ()], np.float32)


def _folder(config: RunConfig, name: str) -> str | None:
    return {"base": None, "start": config.adapter.start}.get(name, name)


def _by_token(config: RunConfig) -> bool:
    return bool(config.objective.build().needs & {"tokens", "token_values"})


def _completions(example: Example) -> tuple[np.ndarray, ...]:
    return (*example.completions, *(example.partners or ()), *(() if example.anchor is None else (example.anchor,)))


def _vectors(batch: Batch, references: int, tokens: bool) -> dict[str, np.ndarray]:
    """What the pass has to find, as zeros: by what is scored and, after a slash, the reference's index."""
    sizes = {"tokens/0" if tokens else "completions/0": batch.size("token_logp" if tokens else "logp")}
    if batch.partners is not None:
        sizes["partners/0"] = len(batch.label)
    if batch.anchors is not None:
        sizes["anchors/0"] = len(batch.origins)
    sizes |= {f"completions/{k}": len(batch.label) for k in range(1, references)}
    return {name: np.zeros(size, np.float32) for name, size in sizes.items()}


def _score(
    config: RunConfig, learner: Learner, batch: Batch, vectors: dict[str, np.ndarray], name: str, reporter: Reporter
) -> dict[str, np.ndarray]:
    """The vectors, filled; rank r takes parts r, r + W, ...

    The parts are those in which `evaluate` scores the policy, completions with anchors together and partners apart as there: in equal
    shapes policy and reference round alike, so that they agree to the last bit before the first update.
    """
    comm, limit = learner.comm, config.train.micro_batch_tokens
    reporter.start(f"reference ({name})", len(batch.origins), "rows")
    for rows in micro_batches(batch, limit, at_least=comm.size, layout=learner.info.layout, device=learner.info.device)[comm.rank :: comm.size]:
        part, places = batch.select(rows)
        for vector, place in (("tokens/0", places.tokens), ("completions/0", places.completions)):
            if vector in vectors:
                found = learner.logps(part.scored, reference=0, tokens=vector == "tokens/0")
                vectors[vector][place] = found[: len(place)]
                if part.anchors is not None:  # they come after the completions
                    ends = np.cumsum(part.anchors.lengths)[:-1] if vector == "tokens/0" else np.arange(1, len(rows))
                    vectors["anchors/0"][places.rows] = [v.sum() for v in np.split(found[len(place) :], ends)]
        if part.partners is not None:
            vectors["partners/0"][places.completions] = learner.logps(part.partners, reference=0)
        for k in range(1, len(config.references)):
            vectors[f"completions/{k}"][places.completions] = learner.logps(part.forest, reference=k)
        reporter.advance(min(len(rows) * comm.size, len(batch.origins)))
    vectors = sum_over_ranks(comm, vectors)
    bad = {row for vector, logp in vectors.items() for row in _rows_of(batch, vector.partition("/")[0], ~np.isfinite(logp))}
    if bad:
        remedy = "Use dtype: float32 or bfloat16." if learner.info.dtype == "float16" else "The model or the reference adapter is damaged."
        origins = sorted({batch.origins[row] for row in bad})
        raise ModelError(f"reference: log-probs that are not finite ({learner.info.dtype}) in {name_rows(origins)}. {remedy}")
    return vectors


def _rows_of(batch: Batch, what: str, mask: np.ndarray) -> list[int]:
    owner = {
        "tokens": np.repeat(batch.forest.owner, batch.forest.lengths),
        "completions": batch.forest.owner,
        "partners": batch.forest.owner,
        "anchors": np.arange(len(batch.origins)),
    }[what]
    return [int(row) for row in owner[mask]]


def _attach(examples: Sequence[Example], vectors: dict[str, np.ndarray]) -> list[Example]:
    others = [v for name, v in vectors.items() if name.startswith("completions/") and name != "completions/0"]
    done, place, token = [], 0, 0
    for row, example in enumerate(examples):
        here = slice(place, place + len(example.completions))
        place = here.stop
        by_token = None
        if "tokens/0" in vectors:
            ends = token + np.cumsum([len(c) for c in example.completions])
            by_token = tuple(np.split(vectors["tokens/0"][token : ends[-1]], ends[:-1] - token))
            token = int(ends[-1])
            logp = tuple(float(np.sum(v)) for v in by_token)
        else:
            logp = tuple(vectors["completions/0"][here].tolist())
        done.append(
            replace(
                example,
                ref_logp=logp,
                ref_token_logp=by_token,
                other_ref_logps=tuple(tuple(v[here].tolist()) for v in others) or None,
                partner_ref_logp=tuple(vectors["partners/0"][here].tolist()) if "partners/0" in vectors else None,
                anchor_ref_logp=float(vectors["anchors/0"][row]) if "anchors/0" in vectors else None,
            )
        )
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
