"""Records from JSON lines, Parquet, CSV, a `datasets` dataset or a hub id, each with the place it came from."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from upo.errors import DataError, UpoError

Record = tuple[str, Mapping[str, Any] | DataError]  # ("train.jsonl:17", the row, or what is wrong with it)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.+-]+)?")
_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".csv")
_TEXTS = frozenset({"prompt", "chosen", "rejected", "completion", "anchor"})  # "7" is an answer there, not a number


def read(source: str | Path | Iterable[Mapping[str, Any]], revision: str | None = None) -> Iterator[Record]:
    """Yield (origin, record). A record that cannot be read comes as the DataError that says so, and reading goes on after it.

    `source` is a file (.jsonl, .json with one object a line, .parquet, .csv), a hub dataset `owner/name` or `owner/name:split` (split
    `train` by default), or rows in memory, e.g. a `datasets.Dataset`. Origins are `file:line`; for Parquet, hub and memory the line is
    the row's number, from 1. Raises DataError if the source as a whole cannot be read, UpoError if a reader is not installed.
    """
    if not isinstance(source, (str, Path)):
        return _numbered("dataset", source)
    path = Path(source)
    if path.is_dir():
        raise DataError(f"{source}: is a folder; name one file in it.")
    if not path.exists():
        if path.suffix.lower() not in _SUFFIXES and _HUB_ID.fullmatch(str(source)):
            return _read_hub(str(source), revision)
        raise DataError(f"{source}: no such file. Give a {', '.join(_SUFFIXES)} file or a hub dataset (owner/name, owner/name:split).")
    if path.stat().st_size == 0:
        raise DataError(f"{source}: the file is empty; it needs at least one row.")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path)
    if suffix == ".csv":
        return _read_csv(path)
    if suffix in _SUFFIXES:
        return _read_json_lines(path)
    unpack = " Unpack it first." if suffix in (".gz", ".bz2", ".xz", ".zst", ".zip") else ""
    raise DataError(f"{source}: unknown kind of file; the name must end in {', '.join(_SUFFIXES)}.{unpack}")


def _numbered(name: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Record]:
    for number, row in enumerate(rows, 1):
        yield f"{name}:{number}", row


def _read_json_lines(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        started = False
        for number, raw in enumerate(file, 1):
            origin = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                yield origin, DataError(f"{origin}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8.")
                continue
            if not line:
                continue
            if not started and line.startswith("["):
                raise DataError(f"{origin}: a JSON array; one object a line is needed: jq -c '.[]' {path.name} > {path.stem}-lines.jsonl")
            started = True
            try:
                record = json.loads(line, object_pairs_hook=_each_once)
            except _Twice as error:
                yield origin, DataError(f'{origin}: the key "{error}" is given twice in one object; remove or rename one.')
                continue
            except (ValueError, RecursionError) as error:
                what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deeply or out of range"
                yield origin, DataError(f"{origin}: broken JSON ({what}); each line must be one complete JSON object.")
                continue
            if isinstance(record, dict):
                yield origin, record
            else:
                yield origin, DataError(f"{origin}: each line must be a JSON object with named fields; this is {describe(record)}.")


class _Twice(Exception):
    """A key that a JSON object has twice."""


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, unless one of its values would replace another. Raises _Twice."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for i, name in enumerate(names) if name in names[:i]))
    return record


def _read_csv(path: Path) -> Iterator[Record]:
    # Bytes that are not UTF-8 are read as lone surrogates, so that the row that holds them can be named.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        line = 2
        while True:
            origin = f"{path}:{line}"
            try:
                header = list(reader.fieldnames or ())
                record = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{origin}: broken CSV ({error}); JSON lines are safer for long texts.") from None
            if twice := sorted({name for name in header if header.count(name) > 1}):
                raise DataError(f"{path}:1: the header names {', '.join(twice)} more than once; rename or remove one of the columns.")
            if record is None:
                return
            line = reader.line_num + 1
            if None in record:
                yield origin, DataError(f"{origin}: more cells than the header has columns; quote texts that hold commas.")
            elif not _is_unicode("".join(f"{key}{value}" for key, value in record.items())):
                yield origin, DataError(f"{origin}: not UTF-8; save the file as UTF-8.")
            else:
                yield origin, {key: _cell(value, key in _TEXTS) for key, value in record.items()}


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _cell(text: str | None, words: bool) -> Any:
    """A CSV cell: conversations and lists as JSON, numbers and true/false as such, all else as text; of `words`, conversations alone."""
    if not text:
        return text
    if text[0] in "[{":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        return text if words and not (isinstance(value, list) and any(isinstance(item, dict) for item in value)) else value
    if words:
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UpoError(f'{path}: reading Parquet needs pyarrow. Install it with: pip install "upo[data]"') from None

    def rows() -> Iterator[Mapping[str, Any]]:
        try:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(f"{path}: not a readable Parquet file ({reason[0]}). Write or download it again.") from None

    return _numbered(str(path), rows())


def _read_hub(name: str, revision: str | None) -> Iterator[Record]:
    try:
        import datasets
    except ImportError:
        raise UpoError(f'{name}: reading hub datasets needs datasets. Install it with: pip install "upo[data]"') from None
    repository, _, split = name.partition(":")
    try:
        rows = datasets.load_dataset(repository, split=split or "train", revision=revision)
    except Exception as error:  # whatever the hub, the network or the builder raises is a source that cannot be read
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"{name}: no such file here, and not readable as a hub dataset ({reason[0][:200]}). "
            "Check the name, the split (owner/name:split) and the connection; `hf auth login` for gated ones."
        ) from None
    return _numbered(name, rows)


def describe(value: Any) -> str:
    """The JSON type of a value, in words."""
    if value is None:
        return "null"
    names: list[tuple[type | tuple[type, ...], str]] = [
        (bool, "true or false"), ((int, float), "a number"), (str, "a string"), ((list, tuple), "a list"), (dict, "an object"),
    ]  # fmt: skip
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)
