"""What a data file holds and what training would make of it: the facts behind `upo data check`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from upo.data.batch import Example
from upo.data.encode import encode
from upo.data.read import read
from upo.data.rows import Row, Rows, parse_rows
from upo.data.text import Text, readable
from upo.data.tokenizer import Tokenizer
from upo.errors import DataError, ModelError


@dataclass(frozen=True)
class Lengths:
    """How long a part of the rows is: five numbers, and counts [b] between edges [b + 1]."""

    count: int
    minimum: int
    median: int
    p95: int
    maximum: int
    edges: list[int]
    counts: list[int]


@dataclass(frozen=True)
class CheckReport:
    """Everything `upo data check` shows; origins are `file:line`."""

    file: str
    layout: str
    shape: str
    records: int
    rows: int  # that would be trained on; without a tokenizer nothing is dropped for its length
    completions: int
    errors: list[str]  # one message per record that cannot be used
    notes: dict[str, list[str]]  # kind of event (notes.NOTES) -> origins
    unit: str  # of lengths: tokens, or words without a tokenizer
    max_length: int | None  # None without a tokenizer
    lengths: dict[str, Lengths]  # prompt; chosen and rejected, or completion; row (prompt and longest completion)
    labels: dict[str, int]  # completions by label: desirable, undesirable, none
    columns: dict[str, dict[str, float]]  # numeric column -> rows that have it, min, mean, max
    gaps: dict[str, list[str]]  # numeric column -> rows without a finite number in it, where there are any
    ignored: list[str]
    prompts: int  # different ones
    duplicate_prompts: list[list[str]]  # origins of the rows that share a prompt, largest group first
    no_end: list[str] | None  # rows with a completion that does not end its turn; None without a tokenizer
    turn_end: str | None  # the token that ends one
    eval_file: str | None = None
    overlap: list[str] = field(default_factory=list)  # rows of the eval file whose prompt is in the file

    @property
    def ok(self) -> bool:
        """Whether training would start on this file."""
        return not self.errors and self.rows > 0

    def to_json(self) -> dict[str, Any]:
        """Plain lists, mappings and numbers."""
        return {"ok": self.ok, **asdict(self)}


def check(
    path: Path | str,
    tokenizer: Tokenizer | None = None,
    max_length: int = 1024,
    *,
    overflow: str = "drop",
    layout: str = "auto",
    eval_path: Path | str | None = None,
    revision: str | None = None,
) -> CheckReport:
    """Look at a file as training would, collecting bad rows where training stops at the first.

    Lengths are tokens with a tokenizer, else words, and then nothing is dropped or cut. Raises DataError if the source cannot be read.
    """
    parsed = parse_rows(read(str(path), revision), layout)
    if parsed.count == 0:
        raise DataError(f"{path}: no rows; it needs at least one.")
    rows, examples = parsed.rows, None
    if tokenizer is not None:
        rows, examples = _encode(parsed, tokenizer, max_length, overflow)
    shared = [[r.origin for r in group] for group in _by_prompt(rows).values()]
    overlap: list[str] = []
    if eval_path is not None:
        others = parse_rows(read(str(eval_path), revision), layout)
        if others.errors:
            raise others.errors[0]
        known = _by_prompt(rows)
        overlap = [r.origin for r in others.rows if _key(r) in known]
    labels = [label for row in rows for label in row.labels]
    columns = _columns(rows)
    return CheckReport(
        file=str(path),
        layout=parsed.layout,
        shape=parsed.shape,
        records=parsed.count,
        rows=len(rows),
        completions=len(labels),
        errors=[str(error) for error in parsed.errors],
        notes={kind: list(origins) for kind, origins in parsed.notes.items()},
        unit="words" if tokenizer is None else "tokens",
        max_length=None if tokenizer is None else max_length,
        lengths=_lengths(rows, examples),
        labels={"desirable": labels.count(1), "undesirable": labels.count(-1), "none": labels.count(0)},
        columns=columns,
        gaps={name: gap for name in columns if (gap := [row.origin for row in rows if name not in row.columns])},
        ignored=list(parsed.ignored),
        prompts=len(shared),
        duplicate_prompts=sorted((s for s in shared if len(s) > 1), key=len, reverse=True),
        no_end=None if examples is None or tokenizer is None else [e.origin for e in examples if not _ends(e, tokenizer)],
        turn_end=None if tokenizer is None else tokenizer.turn_end_text,
        eval_file=None if eval_path is None else str(eval_path),
        overlap=overlap,
    )


def _encode(parsed: Rows, tokenizer: Tokenizer, max_length: int, overflow: str) -> tuple[list[Row], list[Example]]:
    """The rows that fit, with their tokens; a row that the chat template refuses joins the errors."""
    rows, examples = [], []
    for row in parsed.rows:
        try:
            example = encode(row, tokenizer, max_length, overflow, parsed.notes)
        except (DataError, ModelError) as error:
            parsed.errors.append(DataError(str(error)))
            continue
        if example is not None:
            rows.append(row)
            examples.append(example)
    return rows, examples


def _key(row: Row) -> str:
    return json.dumps([row.prompt, row.tools], sort_keys=True)


def _by_prompt(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_key(row), []).append(row)
    return groups


def _ends(example: Example, tokenizer: Tokenizer) -> bool:
    return all(int(c[-1]) in tokenizer.eos_ids for c in example.completions)


def _words(text: Text) -> int:
    return len(readable(text).split())


def _lengths(rows: Sequence[Row], examples: Sequence[Example] | None) -> dict[str, Lengths]:
    if examples is None:
        sizes = [(row.kind, _words(row.prompt), [_words(c) for c in row.completions]) for row in rows]
    else:
        sizes = [(e.kind, len(e.prompt), [len(c) for c in e.completions]) for e in examples]
    parts: dict[str, list[int]] = {"prompt": []}
    for kind, prompt, completions in sizes:
        parts["prompt"].append(prompt)
        for name, length in zip(("chosen", "rejected"), completions, strict=True) if kind == "pair" else (("completion", c) for c in completions):
            parts.setdefault(name, []).append(length)
    parts["row"] = [prompt + max(completions) for _, prompt, completions in sizes]
    return {name: _describe(values) for name, values in parts.items() if values}


def _describe(values: Sequence[int]) -> Lengths:
    """Bins of equal width, a power of two, at most twelve of them."""
    array = np.sort(np.array(values))
    width = 1
    while (int(array[-1]) + width) // width > 12:
        width *= 2
    first = int(array[0]) // width
    edges = [width * i for i in range(first, int(array[-1]) // width + 2)]
    counts = [int(c) for c in np.bincount(array // width - first, minlength=len(edges) - 1)]
    median, p95 = (int(array[math.ceil(q * len(array)) - 1]) for q in (0.5, 0.95))  # nearest rank: a length that occurs
    return Lengths(len(array), int(array[0]), median, p95, int(array[-1]), edges, counts)


def _columns(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    found: dict[str, list[tuple[float, ...]]] = {}
    for row in rows:
        for name, values in row.columns.items():
            found.setdefault(name, []).append(values)
    flat = {name: [v for row in values for v in row] for name, values in found.items()}
    return {n: {"rows": len(found[n]), "min": min(v), "mean": sum(v) / len(v), "max": max(v)} for n, v in flat.items()}
