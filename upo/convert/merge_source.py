"""The weights of a base model, piece by piece in float32: plain ones as they are, MLX's group-quantised ones de-quantised."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from upo import tensors
from upo.errors import ModelError
from upo.models import is_quantized_mlx, weight_files
from upo.tensors import Entry

PIECE = 1 << 22  # elements worked on at a time: 16 MiB in float32
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Quantised:
    """One weight of MLX's affine group quantisation: w = scale * q + bias, one scale and bias for each `group` inputs of a row."""

    bits: int
    group: int
    scales: str  # names of the tensors
    biases: str


@dataclass(frozen=True)
class Weight:
    """A weight of the model as it will be written."""

    dtype: str
    shape: tuple[int, ...]
    packed: Quantised | None = None

    @property
    def size(self) -> int:
        """Bytes, of the dtypes that NumPy knows."""
        return math.prod(self.shape) * np.dtype(tensors.DTYPES[self.dtype]).itemsize


class Source:
    """The weights of a model folder that `upo.models.check_folder` has passed. Nothing is read until it is asked for."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Raises ModelError for a name that is there twice, or a quantisation that cannot be undone here."""
        self.folder = folder
        self.quantised = is_quantized_mlx(dict(config))
        self._entries: dict[str, tuple[Path, Entry]] = {}
        formats = set()
        for path in weight_files(folder):
            header = tensors.read_header(path)
            formats.add(header.metadata.get("format"))
            for name, entry in header.entries.items():
                if name in self._entries:
                    raise ModelError(f"{path}: {name} is in {self._entries[name][0].name} too. Keep one of the two sets of weights in a copy of the folder.")
                self._entries[name] = (path, entry)
        self.is_mlx = self.quantised or formats == {"mlx"}
        self.weights: dict[str, Weight] = {}
        packed = _quantised(folder, config, {name: entry for name, (_, entry) in self._entries.items()}) if self.quantised else {}
        parts = {part for weight in packed.values() if weight.packed for part in (weight.packed.scales, weight.packed.biases)}
        for name, (_, entry) in self._entries.items():
            if name not in parts:
                self.weights[name] = packed.get(name, Weight(entry.dtype, entry.shape))

    def bytes_of(self, name: str) -> int:
        """How large the weight will be on disk."""
        weight, (_, entry) = self.weights[name], self._entries[name]
        return weight.size if weight.packed else entry.end - entry.begin

    def raw(self, name: str) -> Iterator[np.ndarray]:
        """The bytes of a weight that is not packed, unread by anyone: any dtype will do."""
        path, entry = self._entries[name]
        for start in range(entry.begin, entry.end, 4 * PIECE):
            yield self._read(path, "u1", start, min(4 * PIECE, entry.end - start))

    def rows(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """The rows of a weight [..., in], all leading dimensions flattened: (first row, piece [n, in]) in float32, or float64 if stored so."""
        weight = self.weights[name]
        width = weight.shape[-1]
        total, step = math.prod(weight.shape[:-1]), max(1, PIECE // max(width, 1))
        for first in range(0, total, step):
            count = min(step, total - first)
            if weight.packed is None:
                yield first, self._floats(name, first, count, width)
            else:
                q = self._part(name, first, count, width * weight.packed.bits // 32)
                groups = width // weight.packed.group
                scales, biases = (self._floats(part, first, count, groups) for part in (weight.packed.scales, weight.packed.biases))
                yield first, dequantised(q, scales, biases, weight.packed.bits)

    def _floats(self, name: str, first: int, count: int, width: int) -> np.ndarray:
        raw = self._part(name, first, count, width)
        dtype = self._entries[name][1].dtype
        return tensors.float32_from_bf16(raw) if dtype == "BF16" else raw.astype(np.float32) if dtype == "F16" else raw

    def _part(self, name: str, first: int, count: int, width: int) -> np.ndarray:
        path, entry = self._entries[name]
        dtype = np.dtype(tensors.DTYPES[entry.dtype])
        return self._read(path, dtype, entry.begin + first * width * dtype.itemsize, count * width).reshape(count, width)

    def _read(self, path: Path, dtype: Any, start: int, count: int) -> np.ndarray:
        try:
            array = np.fromfile(path, dtype, count, offset=start)
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror or error}).") from None
        if len(array) != count:
            raise ModelError(f"{path}: became shorter while it was read. Leave the base model alone during a merge.")
        return array


def dequantised(q: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int) -> np.ndarray:
    """scale * q + bias [n, in] in float32, for packed q [n, in * bits / 32] uint32 and float32 scales and biases [n, in / group].

    MLX packs a row as one stream of bits, the lowest first.
    """
    rows = len(q)
    packed = np.ascontiguousarray(q, "<u4").view(np.uint8).reshape(rows, -1)
    if 8 % bits == 0:
        levels = (packed[..., None] >> np.arange(0, 8, bits, dtype=np.uint8)) & np.uint8(2**bits - 1)
    else:
        stream = np.unpackbits(packed, axis=1, bitorder="little").reshape(rows, -1, bits)
        levels = np.packbits(stream, axis=2, bitorder="little")  # up to 8 bits: one byte each
    grouped = levels.reshape(rows, scales.shape[1], -1).astype(np.float32)
    return (grouped * scales[..., None] + biases[..., None]).reshape(rows, -1)


def _quantised(folder: Path, config: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Weight]:
    """The packed weights, with their shapes when unpacked. Raises ModelError for another mode than affine."""
    settings = config["quantization"]
    found = {}
    for name, entry in entries.items():
        path = name.removesuffix(".weight")
        scales = entries.get(f"{path}.scales")
        if not name.endswith(".weight") or entry.dtype != "U32" or scales is None:
            continue
        own = settings.get(path)
        own = {**settings, **own} if isinstance(own, dict) else settings
        mode, group = own.get("mode", "affine"), own.get("group_size")
        biases = entries.get(f"{path}.biases")
        if mode != "affine" or biases is None:
            raise ModelError(
                f"{folder}: {name} is quantised in mode {mode}; upo undoes affine only. De-quantise the base first: "
                f"mlx_lm.convert --hf-path {folder} --dequantize --mlx-path FOLDER"
            )
        groups = scales.shape[-1] if scales.shape else 0
        if type(group) is not int or group < 1 or not entry.shape or scales.shape != biases.shape or not groups:
            raise ModelError(f"{folder}: {name}: its scales {list(scales.shape)} and group size {group!r} do not fit one another.")
        width = groups * group
        bits, rest = divmod(32 * entry.shape[-1], width)
        if rest or bits != own.get("bits") or not 2 <= bits <= 8 or entry.shape[:-1] != scales.shape[:-1] or scales.dtype not in FLOATS or biases.dtype != scales.dtype:
            raise ModelError(f"{folder}: {name} {list(entry.shape)} and its scales {list(scales.shape)} are not what {own.get('bits')} bits in groups of {group} make.")
        found[name] = Weight(scales.dtype, (*entry.shape[:-1], width), Quantised(bits, group, f"{path}.scales", f"{path}.biases"))
    return found
