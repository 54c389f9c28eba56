"""Reference log-probs: scored once per text, kept on disk under a key that names everything they depend on.

One pass finds what the objective needs: the rows' completions under each reference (by token where a loss asks for it), KTO's partners and
anchors under the first. What is in the cache is not scored again, whichever run, loss, reward, weight or seed it was scored for, and what
an interrupted pass has scored is in the cache.

In float32 a log-prob depends on what is computed beside it by rounding alone, so any text that was scored counts. In 16 bits it moves
with the shapes of its micro-batch, by up to tenths of nats. There only whole micro-batches count, scored with the same rows in them (so
also with the same `train.micro_batch_tokens` and number of ranks): cached numbers are then those that the pass would find.

Before they are used, the shortest rows that are cached are scored again and compared.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from upo.adapters import read_adapter
from upo.backend import Comm, Learner, ModelInfo
from upo.config import RunConfig
from upo.data.batch import Batch, Example, Places, collate, micro_batches
from upo.data.forest import Forest
from upo.errors import ModelError
from upo.learner import sum_over_ranks
from upo.training.checks import ROUNDING
from upo.training.logp_store import Store, text_keys
from upo.training.metrics import name_rows
from upo.training.reporter import Reporter

KEEP_EVERY = 30.0  # seconds of work that a process which is killed may lose


@dataclass(frozen=True)
class Reference:
    """Rows with their reference log-probs, and how they were come by."""

    examples: list[Example]
    key: str
    scored: int  # completions that were not in the cache


@dataclass
class Pass:
    """Log-probs of completions under one reference: `values` [sum of counts] in their order, `known` [completions] those in the cache."""

    name: str
    reference: int
    tokens: bool
    forest: Callable[[Batch], Forest]
    store: Store
    counts: np.ndarray
    known: np.ndarray
    values: np.ndarray
    keys: list[bytes]
    finer: list[bytes]  # keys of numbers for each token, the sum of which would do; none where they are what is asked for

    @cached_property
    def slots(self) -> list[slice]:
        """The place of each completion in `values`."""
        return [slice(int(end - n), int(end)) for end, n in zip(np.cumsum(self.counts), self.counts, strict=True)]

    def put(self, values: np.ndarray, completions: np.ndarray, found: np.ndarray) -> None:
        """Put what was found about these completions where it belongs in an array like `values`."""
        for i, part in zip(completions, np.split(found, np.cumsum(self.counts[completions])[:-1]), strict=True):
            values[self.slots[i]] = part


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
    return ", ".join(_identity(config, name) for name in config.references)


def adapter_hash(folder: str) -> str:
    """SHA-256 over what an adapter computes: its scale and its arrays."""
    adapter = read_adapter(folder)
    digest = hashlib.sha256(repr(adapter.scale).encode())
    for name, array in sorted(adapter.arrays.items()):
        digest.update(f"{name}{array.shape}".encode() + np.ascontiguousarray(array, "<f4").tobytes())
    return digest.hexdigest()


def reference_key(config: RunConfig, info: ModelInfo, backend: str, reference: int | None = None) -> str:
    """Names what log-probs depend on besides their text: weights, reference (None: all), number formats, kind of device, layout."""
    identity = reference_identity(config) if reference is None else _identity(config, config.references[reference])
    parts = (info.weights_hash, identity, config.quantize, info.dtype, backend, info.device.split(":")[0], info.layout)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def with_reference(config: RunConfig, learner: Learner, backend: str, examples: Sequence[Example], name: str, reporter: Reporter) -> Reference:
    """The rows with what the objective needs of the references, from the cache where it has them, else by one pass over all ranks.

    `name` is the split's, for messages. Rank 0 reads the cache. Raises ModelError naming rows whose log-prob is not finite.
    """
    batch, comm, info = collate(examples), learner.comm, learner.info
    exact = info.dtype == "float32"
    cut = partial(micro_batches, limit=info.micro_batch_tokens, at_least=comm.size, layout=info.layout, device=info.device)
    # The parts are those in which `evaluate` scores the policy, completions with anchors together and partners apart as there: in equal
    # shapes policy and reference round alike, so that they agree to the last bit before the first update.
    parts = cut(batch)
    passes = _passes(config, info, backend, batch)
    for rows in [list(range(len(examples)))] if exact else parts:
        part, places = batch.select(rows)
        for p in passes:
            at = _completions_of(p, batch, places)
            for keys, tokens in ((p.keys, p.tokens), *(() if p.tokens else ((p.finer, True),))):
                for i, key in zip(at, text_keys(p.forest(part), tokens=tokens, alone=exact), strict=True):
                    keys[i] = key
    _look_up(passes, comm)
    _spot_check(passes, learner, batch, parts, name, reporter)
    missing = sorted({row for p in passes for row in _rows_of(p, batch, ~p.known)})
    scored = sum(int((~p.known).sum()) for p in passes)
    if missing:
        left = set(missing)
        todo = [rows for rows in parts if left & set(rows)]
        if exact and len(missing) < len(examples):
            todo = [[missing[i] for i in rows] for rows in cut(batch.select(missing)[0])]
        _score(passes, learner, batch, todo, name, reporter)
        _check_finite(passes, batch, info.dtype)
    return Reference(_attach(examples, passes), reference_key(config, info, backend), scored)


def pass_size(config: RunConfig, examples: Sequence[Example]) -> int:
    """Completions that the pass scores: KTO's partners and anchors under the first reference, the rows' own under each."""
    further = len(config.references) - 1
    return sum(len(_completions(e)) + further * len(e.completions) for e in examples)


def logps_of(examples: Sequence[Example]) -> np.ndarray:
    """[completions and partners] the (first) reference's log-probs that rows carry."""
    return np.array([v for name in ("ref_logp", "partner_ref_logp") for e in examples for v in getattr(e, name) or ()], np.float32)


def _folder(config: RunConfig, name: str) -> str | None:
    return {"base": None, "start": config.adapter.start}.get(name, name)


def _identity(config: RunConfig, name: str) -> str:
    folder = _folder(config, name)
    return "base" if folder is None else adapter_hash(folder)


def _by_token(config: RunConfig) -> bool:
    return bool(config.objective.build().needs & {"tokens", "token_values"})


def _completions(example: Example) -> tuple[np.ndarray, ...]:
    return (*example.completions, *(example.partners or ()), *(() if example.anchor is None else (example.anchor,)))


def _passes(config: RunConfig, info: ModelInfo, backend: str, batch: Batch) -> list[Pass]:
    """What there is to find; nothing is known yet."""

    def made(name: str, reference: int, forest: Callable[[Batch], Forest], tokens: bool = False) -> Pass:
        lengths = forest(batch).lengths
        counts = lengths if tokens else np.ones(len(lengths), np.int64)
        store = Store(reference_key(config, info, backend, reference))
        known, values, keys = np.zeros(len(lengths), bool), np.zeros(counts.sum(), np.float32), [b""] * len(lengths)
        return Pass(name, reference, tokens, forest, store, counts, known, values, keys, [] if tokens else list(keys))

    found = [made("own", 0, lambda b: b.scored, _by_token(config))]
    if batch.partners is not None:
        found.append(made("partners", 0, lambda b: b.partners))  # type: ignore[arg-type, return-value]
    return [*found, *(made("other", k, lambda b: b.forest) for k in range(1, len(config.references)))]


def _completions_of(p: Pass, batch: Batch, places: Places) -> np.ndarray:
    """Where the completions of a part stand in a pass: anchors come after all completions."""
    anchors = p.name == "own" and batch.anchors is not None
    return np.concatenate([places.completions, len(batch.label) + places.rows]) if anchors else places.completions


def _rows_of(p: Pass, batch: Batch, mask: np.ndarray) -> list[int]:
    return [int(row) for row in p.forest(batch).owner[mask]]


def _look_up(passes: list[Pass], comm: Comm) -> None:
    """Fill in what rank 0 finds in the cache; adding zeros of the other ranks changes no bit."""
    for p in passes if comm.rank == 0 else ():
        found = p.store.read([*p.keys, *p.finer])
        found |= {key: np.sum(found[fine], keepdims=True) for key, fine in zip(p.keys, p.finer, strict=False) if fine in found and key not in found}
        for i, key in enumerate(p.keys):
            if key in found and len(found[key]) == p.counts[i] and np.isfinite(found[key]).all():
                p.values[p.slots[i]], p.known[i] = found[key], True
    for p in passes if comm.size > 1 else ():
        p.values, p.known = comm.all_sum(p.values), comm.all_sum(p.known.astype(np.float32)) > 0


def _spot_check(passes: list[Pass], learner: Learner, batch: Batch, parts: list[list[int]], name: str, reporter: Reporter) -> None:
    """Score the last micro-batch that is known, of the shortest rows, again. Where it differs by more than rounding, forget what is cached."""
    off = 0.0
    for rows in reversed(parts) if learner.comm.rank == 0 else ():
        part, places = batch.select(rows)
        if known := [p for p in passes if p.known[_completions_of(p, batch, places)].all()]:
            p, now = known[0], np.zeros_like(known[0].values)
            here = _completions_of(p, batch, places)
            p.put(now, here, learner.logps(p.forest(part), reference=p.reference, tokens=p.tokens))
            off = max(abs(float(now[p.slots[i]].sum() - p.values[p.slots[i]].sum())) for i in here)
            break
    off = float(learner.comm.all_sum(np.array([off], np.float32))[0])
    if off <= ROUNDING[learner.info.dtype]:
        return
    reporter.warn(f"Reference ({name}): cached log-probs differ by {off:.3g} nats from those computed now, more than rounding explains. All are scored anew.")
    for p in passes:
        p.known[:], p.values[:] = False, 0
        if learner.comm.rank == 0:
            p.store.clear()


def _score(passes: list[Pass], learner: Learner, batch: Batch, parts: list[list[int]], name: str, reporter: Reporter) -> None:
    """Fill in the rest; rank r takes parts r, r + W, ... and keeps what it has found, at the latest when it is interrupted."""
    comm, new = learner.comm, [np.zeros_like(p.values) for p in passes]
    kept = [p.known.copy() for p in passes]
    done = [np.zeros_like(p.known) for p in passes]

    def keep() -> None:
        for p, values, ready, old in zip(passes, new, done, kept, strict=True):
            fresh = np.flatnonzero(ready & ~old)
            by_text = [(p.keys[i], values[p.slots[i]]) for i in fresh]
            p.store.add({key: found for key, found in by_text if np.isfinite(found).all()})
            old |= ready

    rows_left, last = sum(map(len, parts)), time.monotonic()
    reporter.start(f"reference ({name})", rows_left, "rows")
    try:
        for rows in parts[comm.rank :: comm.size]:
            part, places = batch.select(rows)
            for p, values, ready in zip(passes, new, done, strict=True):
                here = _completions_of(p, batch, places)
                if not p.known[here].all():
                    p.put(values, here, learner.logps(p.forest(part), reference=p.reference, tokens=p.tokens))
                    ready[here] = True
            if time.monotonic() - last >= KEEP_EVERY:
                keep()
                last = time.monotonic()
            reporter.advance(min(len(rows) * comm.size, rows_left))
    except BaseException:
        keep()
        raise
    whole = sum_over_ranks(comm, {str(k): values for k, values in enumerate(new)})
    for k, p in enumerate(passes):
        old = np.repeat(p.known, p.counts)
        new[k] = p.values = np.where(old, p.values, whole[str(k)]).astype(np.float32)
        done[k] = np.ones_like(p.known)
    if comm.rank == 0:  # also what the others found, which may have written to disks of their own
        keep()


def _check_finite(passes: list[Pass], batch: Batch, dtype: str) -> None:
    bad = {row for p in passes for row in _rows_of(p, batch, np.logical_or.reduceat(~np.isfinite(p.values), np.cumsum(p.counts) - p.counts))}
    if bad:
        remedy = "Use dtype: float32 or bfloat16." if dtype == "float16" else "The model or the reference adapter is damaged."
        origins = sorted({batch.origins[row] for row in bad})
        raise ModelError(f"reference: log-probs that are not finite ({dtype}) in {name_rows(origins)}. {remedy}")


def _attach(examples: Sequence[Example], passes: list[Pass]) -> list[Example]:
    by_text = {p.name: np.split(p.values, np.cumsum(p.counts)[:-1]) for p in passes if p.name != "other"}
    own, partners = by_text["own"], by_text.get("partners")
    others = [p.values for p in passes if p.name == "other"]
    done, place, completions = [], 0, sum(len(e.completions) for e in examples)
    for row, example in enumerate(examples):
        here = slice(place, place + len(example.completions))
        place = here.stop
        done.append(
            replace(
                example,
                ref_logp=tuple(float(np.sum(v)) for v in own[here]),
                ref_token_logp=tuple(own[here]) if passes[0].tokens else None,
                other_ref_logps=tuple(tuple(v[here].tolist()) for v in others) or None,
                partner_ref_logp=None if partners is None else tuple(float(v[0]) for v in partners[here]),
                anchor_ref_logp=float(np.sum(own[completions + row])) if len(own) > completions else None,
            )
        )
    return done
