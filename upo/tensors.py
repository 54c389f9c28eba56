"""Safetensors on NumPy alone: the same files on either backend and without one.

Format: 8 bytes little-endian header length, JSON header {name: {dtype, shape, data_offsets}}, then the data without gaps. bfloat16, which
NumPy does not know, is its own bits in uint16. A header is not trusted: it is checked against the file before anything is read.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from upo.errors import ModelError

DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
_NAMES = {numpy: name for name, numpy in DTYPES.items() if name != "BF16"}
_LONGEST_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in the file: its bytes are [begin, end), counted from the start of the file."""

    dtype: str  # safetensors' name, e.g. BF16
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """The checked header of a file."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    raw: bytes


def read_header(path: Path | str) -> Header:
    """Read and check a header. Raises ModelError naming the file for anything that does not fit the file or the format."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise ModelError(
                    f"{path}: not a safetensors file, or cut short: the header would end beyond the file. Download or write it again."
                )
            raw = file.read(length)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error}).") from None
    try:
        parsed = json.loads(raw.decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: the safetensors header is damaged ({error}).") from None
    if not isinstance(parsed, dict):
        raise ModelError(f"{path}: the safetensors header is not a mapping.")
    metadata = parsed.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise ModelError(f"{path}: the metadata of the safetensors header is not a mapping.")
    entries = {name: _entry(path, name, value, 8 + length) for name, value in parsed.items()}
    place = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != place:
            raise ModelError(
                f"{path}: tensor {name} {'overlaps another' if entry.begin < place else 'leaves a gap before it'}; the file is damaged."
            )
        place = entry.end
    if place != size:
        raise ModelError(
            f"{path}: holds {size} bytes, its header describes {place}; the file is cut short or damaged. Download or write it again."
        )
    return Header(entries, {str(k): str(v) for k, v in metadata.items()}, raw)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _entry(path: Path, name: str, value: Any, start: int) -> Entry:
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        sound = all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)) and begin <= end and isinstance(dtype, str)
        sound = sound and isinstance(shape, list) and len(shape) <= 32  # NumPy's own limit before 2.0
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ModelError(f"{path}: tensor {name}: dtype, shape or offsets are missing or malformed.")
    if dtype in DTYPES and end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        raise ModelError(f"{path}: tensor {name}: {end - begin} bytes do not make {dtype} {shape}.")
    return Entry(dtype, tuple(shape), start + begin, start + end)


def read(path: Path | str, names: Iterable[str] | None = None, upcast: bool = True) -> dict[str, np.ndarray]:
    """The named tensors (all of them by default).

    `upcast` turns the 16-bit floats into float32, which is exact; without it bfloat16 comes as its bits in uint16. Raises ModelError for a
    damaged file, a missing name, or a dtype that NumPy has no equal for (float8).
    """
    header = read_header(path)
    arrays = {}
    with Path(path).open("rb") as file:
        for name in header.entries if names is None else names:
            entry = header.entries.get(name)
            if entry is None:
                raise ModelError(f"{path}: has no tensor {name}.")
            if entry.dtype not in DTYPES:
                raise ModelError(f"{path}: tensor {name} is {entry.dtype}, which is not supported.")
            file.seek(entry.begin)
            array = np.fromfile(file, DTYPES[entry.dtype], math.prod(entry.shape))
            if array.size != math.prod(entry.shape):
                raise ModelError(f"{path}: became shorter while it was read, and is cut short now. Write it again.")
            array = array.reshape(entry.shape)
            if upcast and entry.dtype == "BF16":
                array = float32_from_bf16(array)
            elif upcast and entry.dtype == "F16":
                array = array.astype(np.float32)
            arrays[name] = array
    return arrays


def write(
    path: Path | str,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> None:
    """Write a file atomically: to a temporary name, synced, then renamed. The same arrays give the same bytes.

    `dtypes` maps names to safetensors dtypes to be stored as; BF16 takes floats (rounded to nearest even) or uint16 bits as they are.
    """
    stored = {name: _stored(name, np.asarray(array), (dtypes or {}).get(name)) for name, array in arrays.items()}
    layout = {name: (dtype, array.shape, array.nbytes) for name, (dtype, array) in stored.items()}
    write_streamed(path, layout, lambda name: [stored[name][1]], metadata)


def write_streamed(
    path: Path | str,
    layout: Mapping[str, tuple[str, tuple[int, ...], int]],
    produce: Callable[[str], Iterable[np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Like `write`, but a piece at a time, so that a file may be larger than the memory.

    `layout` gives each tensor's safetensors dtype, shape and bytes; `produce` its data as arrays in the stored form, in order.
    """
    path = Path(path)
    # Wider elements first: every tensor is then aligned to its element size, which some readers rely on.
    order = sorted(layout, key=lambda name: (-np.dtype(DTYPES.get(layout[name][0], "u1")).itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    place = 0
    for name in order:
        dtype, shape, size = layout[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            for name in order:
                written = sum(file.write(np.ascontiguousarray(piece).data) for piece in produce(name))
                if written != layout[name][2]:
                    raise ValueError(f"{name}: {written} bytes were produced, {layout[name][2]} announced")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private to the user
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _stored(name: str, array: np.ndarray, dtype: str | None) -> tuple[str, np.ndarray]:
    if dtype == "BF16":
        return dtype, array if array.dtype == np.uint16 else bf16_from_float32(array)
    if dtype is not None:
        array = array.astype(DTYPES[dtype])
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    if little.dtype.str not in _NAMES:
        raise TypeError(f"{name}: {array.dtype} has no safetensors equivalent")
    return _NAMES[little.dtype.str], little


def bf16_from_float32(array: np.ndarray) -> np.ndarray:
    """The bits (uint16) of the nearest bfloat16, ties to even; NaN stays NaN, what is too large becomes infinite."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)  # rounding could carry a NaN over into infinity
    return np.where(np.isnan(array), quiet, rounded).astype(np.uint16).reshape(np.shape(array))


def float32_from_bf16(bits: np.ndarray) -> np.ndarray:
    """Exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
