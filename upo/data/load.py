"""From a configuration to the examples of a run, with a word on everything that happened to the rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from upo.config import RunConfig
from upo.data.batch import Example
from upo.data.control import Control
from upo.data.encode import encode
from upo.data.notes import NOTES, Notes, places, plural
from upo.data.read import read
from upo.data.rows import Rows, parse_rows
from upo.data.split import prompt_key, split_by_prompt
from upo.data.tokenizer import Tokenizer
from upo.errors import DataError
from upo.training.reporter import Reporter

Source = str | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Report:
    """What was read and what became of it."""

    layout: str
    shape: str
    read: int  # records in the source(s)
    train_rows: int
    eval_rows: int
    notes: Notes  # kind of event -> origins
    columns: tuple[str, ...]  # numeric columns, present in some row
    ignored: tuple[str, ...]  # fields without use
    overlap: tuple[str, ...] = field(default=())  # held-out rows whose prompt is trained on


@dataclass(frozen=True)
class Dataset:
    """The rows of a run."""

    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    report: Report
    hash: str  # of token ids, labels and columns: what a resumed run must find unchanged


def load_data(
    config: RunConfig, tokenizer: Tokenizer, reporter: Reporter, *, train: Source | None = None, held_out: Source | None = None
) -> Dataset:
    """Read, encode, fit to `train.max_length` and split the rows of a run.

    `train` and `held_out` may be rows in memory (e.g. a `datasets.Dataset`) in place of the configured sources. Raises DataError for
    rows that cannot be used and where nothing is left.
    """
    share = config.data.eval if held_out is None else 0.0
    rows, examples, notes = _load(config, train if train is not None else config.data.train, tokenizer, reporter)
    count, ignored = rows.count, rows.ignored
    held: list[Example] = []
    source = held_out if held_out is not None else share if isinstance(share, str) else None
    if source is not None:
        others, held, other_notes = _load(config, source, tokenizer, reporter)
        notes.merge(other_notes)
        count, ignored = count + others.count, tuple(dict.fromkeys((*ignored, *others.ignored)))
    elif not isinstance(share, str) and share > 0:
        examples, held = split_by_prompt(examples, share, config.train.seed)
        reporter.info(f"held out: {plural(len(held), 'row')}, split by prompt; {len(examples):,} left for training")
    trained = {prompt_key(e.prompt) for e in examples}
    overlap = tuple(e.origin for e in held if prompt_key(e.prompt) in trained)
    if overlap:
        reporter.warn(f"{plural(len(overlap), 'held-out row')} with prompts that are trained on ({places(overlap)}); evaluation will look too good")
    columns = tuple(dict.fromkeys(name for e in (*examples, *held) for name in e.columns))
    report = Report(rows.layout, rows.shape, count, len(examples), len(held), notes, columns, ignored, overlap)
    return Dataset(tuple(examples), tuple(held), report, dataset_hash(examples, held))


def _load(config: RunConfig, source: Source, tokenizer: Tokenizer, reporter: Reporter) -> tuple[Rows, list[Example], Notes]:
    name = source if isinstance(source, str) else "dataset"
    rows = parse_rows(read(source, config.data.revision), config.data.layout)
    if rows.errors:
        more = f" ({plural(len(rows.errors) - 1, 'more row')} cannot be used; `upo data check {name}` lists them.)" if rows.errors[1:] else ""
        raise DataError(f"{rows.errors[0]}{more}")
    if rows.count == 0:
        raise DataError(f"{name}: no rows; it needs at least one.")
    examples, control = [], Control.of(config.data.control, tokenizer)
    reporter.start("tokenise", len(rows.rows), "rows")
    for row in rows.rows:
        room = config.train.max_length - (control.room(row.labels) if control else 0)
        example = encode(row, tokenizer, room, config.train.overflow, rows.notes)
        reporter.advance(1)
        if example is not None:
            examples.append(control.before(example) if control else example)
    if not examples:
        reasons = "; ".join(f"{len(rows.notes[k])} {NOTES[k].text} ({places(rows.notes[k])})" for k in NOTES if NOTES[k].dropped and k in rows.notes)
        raise DataError(f"{name}: no row is left of {rows.count}: {reasons}. train.max_length is {config.train.max_length}; raise it, or shorten the texts.")
    _tell(name, rows, examples, reporter)
    return rows, examples, rows.notes


def _tell(name: str, rows: Rows, examples: Sequence[Example], reporter: Reporter) -> None:
    completions = sum(len(e.completions) for e in examples)
    columns = sorted({c for e in examples for c in e.columns})
    line = f"{name}: {rows.layout} ({rows.shape}), {plural(len(examples), 'row')}, {plural(completions, 'completion')}"
    line += f", {sum(e.tokens for e in examples):,} tokens"
    if columns:
        line += f"; columns {', '.join(columns)}"
    if rows.ignored:
        line += f"; not used: {', '.join(rows.ignored)}"
    reporter.info(line)
    for warning, text in rows.notes.lines():
        (reporter.warn if warning else reporter.info)(text)


def dataset_hash(train: Sequence[Example], held_out: Sequence[Example]) -> str:
    """SHA-256 over token ids, labels and columns of both parts, in their order."""
    digest = hashlib.sha256()
    for part in (train, held_out):
        digest.update(f"part {len(part)}\n".encode())
        for e in part:
            extras = [None if e.anchor is None else e.anchor.tolist(), e.ref_rewards]
            record = [e.kind, e.prompt.tolist(), [c.tolist() for c in e.completions], e.labels, e.columns, *(extras if any(extras) else ())]
            digest.update(json.dumps(record, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
