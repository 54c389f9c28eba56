"""Rows to train on and rows held out, of other conversations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from upo.errors import DataError
from upo.random import permutation

Row = Mapping[str, Any]


def read_rows(path: Path) -> list[Row]:
    """JSON lines in TRL's conversational layout. Raises DataError."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise DataError(f"--data {path}: not there. Give JSON lines of prompt, chosen and rejected, each a list of messages.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"--data {path}: {error}") from None
    for number, row in enumerate(rows, 1):
        try:
            opening(row)
            assert row["chosen"] and row["rejected"]
        except (KeyError, IndexError, TypeError, AssertionError):
            raise DataError(f"{path}:{number}: not a row of prompt, chosen and rejected, each a list of messages.") from None
    return rows


def opening(row: Row) -> str:
    """The first message of the conversation: rows that share it are of one kind, however they go on."""
    return " ".join(str(row["prompt"][0]["content"]).split())


def split(rows: Sequence[Row], train: int, heldout: int) -> tuple[list[Row], list[Row]]:
    """`train` rows, and `heldout` ones of as many conversations whose opening is none of theirs. The same for every seed of a run.

    Raises DataError where there are too few.
    """
    drawn = [rows[i] for i in permutation(len(rows), 0, "split", 0)]
    known = {opening(row) for row in drawn[:train]}
    others = list({opening(row): row for row in reversed(drawn[train:]) if opening(row) not in known}.values())[::-1]
    if len(drawn) < train or len(others) < heldout:
        raise DataError(
            f"--rows {train} --pairs {heldout}: the data has {len(rows)} rows, which leaves {len(others)} other conversations beside {min(train, len(drawn))} "
            "rows to train on. Ask for fewer, or bring more rows."
        )
    return drawn[:train], others[:heldout]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """One line each."""
    path.write_text(_lines(rows), encoding="utf-8")


def rows_hash(rows: Sequence[Row]) -> str:
    """Of what `write_rows` writes."""
    return hashlib.sha256(_lines(rows).encode()).hexdigest()[:16]


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
