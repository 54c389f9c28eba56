"""The work that every contender does: the same rows in the same order, model, adapter and batch."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from upo import adapters, load_config
from upo.data.load import load_data
from upo.data.order import step_rows, total_steps
from upo.data.tokenizer import load_tokenizer
from upo.errors import DataError
from upo.memory import model_shapes
from upo.targets import fresh_arrays
from upo.training.reporter import Reporter, Silent

ROWS = Path(__file__).parents[2].parent / "shared" / "data" / "hh_harmless.jsonl"
WORDS = " the a an of to in is on it for as with that this was be are by not at or from but his her they all we can she out who one has had".split()


@dataclass(frozen=True)
class Work:
    """Where the files of the work lie, and its numbers: the job of each contender."""

    model: str  # folder
    rows: str  # as the data came, for us: we put them in order ourselves
    ordered: str  # in the order in which we take them, for those that take them as they come
    tokens: str  # the same as token ids
    adapter: str  # the initial adapter of all, in PEFT's layout
    digest: str  # SHA-256 of the token ids
    pairs: int
    steps: int
    batch_size: int = 8
    max_length: int = 1024
    rank: int = 16
    alpha: int = 32
    beta: float = 0.1
    lr: float = 1e-4
    clip: float = 1.0
    seed: int = 0


def prepare(folder: Path, rows: Sequence[dict[str, Any]], model: Path, *, batch_size: int, max_length: int, **numbers: Any) -> Work:
    """Write the files of the work into `folder`; one epoch. Raises DataError if a row does not fit `max_length` as a whole.

    A row that one contender cuts and another drops would make the work unequal.
    """
    folder.mkdir(parents=True, exist_ok=True)
    work = Work(str(model), *(str(folder / name) for name in ("rows.jsonl", "ordered.jsonl", "tokens.jsonl", "adapter")), "", len(rows), 0, batch_size, max_length, **numbers)
    _write(work.rows, rows)
    config = load_config({"model": str(model), "data": {"train": work.rows}, "train": {"batch_size": batch_size, "max_length": max_length, "seed": work.seed}})
    data = load_data(config, load_tokenizer(model), Silent())
    examples, shortened = data.train, "trimmed" in data.report.notes
    if len(examples) != len(rows) or shortened:
        raise DataError(f"{len(rows) - len(examples)} rows do not fit {max_length} tokens{' and others were shortened' * shortened}; take others, or raise --max-length.")
    work = replace(work, steps=total_steps(config.train, len(rows)))
    order = [i for step in range(work.steps) for i in step_rows(len(rows), batch_size, work.seed, step)]
    _write(work.ordered, [rows[i] for i in order])
    _write(work.tokens, [{"prompt": examples[i].prompt.tolist(), "completions": [c.tolist() for c in examples[i].completions]} for i in order])
    write_adapter(Path(work.adapter), model, work)
    return replace(work, digest=hashlib.sha256(Path(work.tokens).read_bytes()).hexdigest())


def write_adapter(folder: Path, model: Path, work: Work) -> None:
    """The adapter with which a run of ours starts, so that the others start with it too."""
    dims = model_shapes(model).linears
    arrays = fresh_arrays(dims, sorted(dims), work.rank, work.seed)
    adapters.write_adapter(folder, arrays, adapters.peft_config(str(model), work.rank, work.alpha, sorted(dims)), overwrite=True)


def real_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """The first rows of a file. Raises DataError if it is not there."""
    if not path.is_file():
        raise DataError(f"--data {path}: no such file. Give JSON lines with prompt, chosen and rejected; benchmarks/README.md says how to make them.")
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for _, line in zip(range(count), file, strict=False)]


def made_pairs(lengths: Iterable[tuple[int, int, int]], words: Sequence[str] = WORDS, seed: int = 0) -> list[dict[str, str]]:
    """A pair of plain strings for each (prompt, chosen, rejected) length in tokens, of words that are one token each; a completion's
    length includes the end of text, which is not written."""
    draw = random.Random(seed)

    def text(tokens: int) -> str:
        return "".join(f" {draw.choice(words)}" for _ in range(tokens))

    return [{"prompt": text(p), "chosen": text(c - 1), "rejected": text(r - 1)} for p, c, r in lengths]


def made_groups(rows: int, prompt: int, completion: int, count: int, words: Sequence[str] = WORDS, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with `count` completions of one length each, and a score for every one."""
    pairs = made_pairs([(prompt, completion, completion)] * (rows * count), words, seed)
    parts = [pairs[i * count : (i + 1) * count] for i in range(rows)]
    return [{"prompt": part[0]["prompt"], "completions": [p["chosen"] for p in part], "score": [i / count for i in range(count)]} for part in parts]


def _write(path: str, rows: Sequence[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def quickstart_model(reporter: Reporter | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct."""
    from upo.quickstart.model import model_folder

    return model_folder(reporter or Silent())
