"""The neutral form of an adapter that every format is read into and written from, and the equality a conversion must keep."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from upo import tensors
from upo.errors import ModelError

FLOATS = ("F32", "BF16", "F16", "F64")  # safetensors' names of what an adapter may be stored as
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
Kind = Literal["linear", "embedding", "experts"]


@dataclass(frozen=True)
class Tensor:
    """An array as its file holds it, so that moving it changes no bit; bfloat16 is its bits in uint16."""

    dtype: str  # safetensors' name
    raw: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.raw.shape

    def values(self) -> np.ndarray:
        """The numbers, exactly, in float64."""
        return (tensors.float32_from_bf16(self.raw) if self.dtype == "BF16" else self.raw).astype(np.float64)

    def moved(self, move: Callable[[np.ndarray], np.ndarray]) -> Tensor:
        """The same numbers in another shape or order."""
        return Tensor(self.dtype, np.ascontiguousarray(move(self.raw)))

    def cast(self, dtype: str) -> Tensor:
        """Rounded to another dtype, ties to even."""
        return self if dtype == self.dtype else from_values(self.values(), dtype)

    def same(self, other: Tensor) -> bool:
        """Bit for bit."""
        return self.dtype == other.dtype and self.shape == other.shape and self.raw.tobytes() == other.raw.tobytes()


def from_values(values: np.ndarray, dtype: str) -> Tensor:
    """Numbers rounded to a dtype."""
    if dtype == "BF16":
        return Tensor(dtype, tensors.bf16_from_float32(values.astype(np.float32)))
    with np.errstate(over="ignore"):
        return Tensor(dtype, values.astype(tensors.DTYPES[dtype]))


def multiplied(tensor: Tensor, factor: float) -> Tensor:
    """tensor * factor: in its own dtype where that is exact (a power of two, no over- or underflow), else in float32."""
    wanted = tensor.values() * factor
    for dtype in (tensor.dtype, "F32"):
        result = from_values(wanted, dtype)
        if np.array_equal(result.values(), wanted):
            return result
    return result


def zeros_like(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return Tensor(tensor.dtype, np.zeros(shape, tensor.raw.dtype))


def joined(parts: list[Tensor], axis: int) -> Tensor:
    """Concatenated; parts of different dtypes become float32, which holds the 16-bit floats exactly."""
    dtype = parts[0].dtype if len({part.dtype for part in parts}) == 1 else "F32"
    return Tensor(dtype, np.concatenate([part.cast(dtype).raw for part in parts], axis))


@dataclass(frozen=True)
class Module:
    """One adapted weight W + scale * B A. Under DoRA each output row of the sum is then rescaled to its magnitude.

    linear: W [out, in], A [r, in], B [out, r]. embedding: W^T [dim, vocab], A [r, vocab], B [dim, r]; `tied` if the output head, which
    shares the weight, carries the same adapter. experts: W [E, out, in], A [E, r, in], B [E, out, r].
    """

    kind: Kind
    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None  # [out]
    tied: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[-2]


@dataclass(frozen=True)
class Adapter:
    """What an adapter is, whatever its format.

    Modules go by their path in transformers >= 5; experts by `<path of the experts>.gate_proj`, `.up_proj`, `.down_proj`.
    """

    base_model: str | None  # as the source names it
    modules: dict[str, Module]
    dropout: float  # of a training that would go on; nothing at inference
    notes: tuple[str, ...] = ()  # what a reader should know, one sentence each

    @property
    def dora(self) -> bool:
        return any(module.magnitude is not None for module in self.modules.values())


def padded(module: Module, rank: int) -> Module:
    """With zero rows in A and zero columns in B up to `rank`: the same product."""
    missing = rank - module.rank
    if not missing:
        return module
    a, b = module.a, module.b
    return replace(
        module,
        a=joined([a, zeros_like(a, (*a.shape[:-2], missing, a.shape[-1]))], -2),
        b=joined([b, zeros_like(b, (*b.shape[:-1], missing))], -1),
    )


def trimmed(module: Module) -> Module:
    """Without the last ranks that are zero in A and in B, as padding left them: no gradient could ever wake those."""
    a, b = module.a.raw, module.b.raw
    rank = module.rank
    while rank > 1 and not a[..., rank - 1, :].any() and not b[..., rank - 1].any():
        rank -= 1
    if rank == module.rank:
        return module
    return replace(module, a=module.a.moved(lambda x: x[..., :rank, :]), b=module.b.moved(lambda x: x[..., :rank]))


def rescaled(module: Module, scale: float) -> Module:
    """With another scale, the difference taken up by B."""
    if scale == module.scale:
        return module
    return replace(module, b=multiplied(module.b, module.scale / scale), scale=scale)


def uniform(modules: dict[str, Module]) -> tuple[dict[str, Module], int, float, list[str]]:
    """All modules with one rank and one scale, as some formats want it; and notes on what that took.

    The rank is the largest; the scale the one most modules have.
    """
    rank = max(module.rank for module in modules.values())
    scales = [module.scale for module in modules.values() if module.scale]
    scale = max(sorted(set(scales)), key=scales.count) if scales else 1.0
    result = {path: rescaled(padded(module, rank), scale) for path, module in modules.items()}
    notes = []
    if padded_ones := sum(module.rank != rank for module in modules.values()):
        notes.append(f"{padded_ones} of {len(modules)} modules have a rank below {rank}: padded with zeros, which changes nothing.")
    if changed := sum(module.scale != scale for module in modules.values()):
        inexact = sum(math.frexp(module.scale / scale)[0] != 0.5 for module in modules.values() if module.scale)
        how = f"; {inexact} by no power of two, which rounds B in float32" if inexact else ", exactly"
        notes.append(f"{changed} of {len(modules)} modules have another scale than {scale:g}: taken up by B{how}.")
    return result, rank, scale, notes


def difference(one: Module, other: Module) -> float:
    """||scale B A - scale' B' A'|| / ||scale B A||, Frobenius, in float64; infinity if the shapes or kinds differ.

    The products are never formed: with [B, -B'] = Q R and [A; A']^T = P S the norm of their difference is that of R S^T.
    """
    shapes = [(m.kind, m.tied, m.a.shape[:-2], m.a.shape[-1], m.b.shape[-2]) for m in (one, other)]
    if shapes[0] != shapes[1]:
        return float("inf")
    a, b, a2, b2 = (t.values() for t in (one.a, one.b, other.a, other.b))
    b, b2 = one.scale * b, other.scale * b2
    size = _norm(b, a)
    gap = _norm(np.concatenate([b, -b2], -1), np.concatenate([a, a2], -2))
    return gap / size if size else (0.0 if gap == 0 else float("inf"))


def _norm(b: np.ndarray, a: np.ndarray) -> float:
    r, s = np.linalg.qr(b, mode="r"), np.linalg.qr(np.swapaxes(a, -1, -2), mode="r")
    return float(np.linalg.norm(r @ np.swapaxes(s, -1, -2)))


def check_equal(source: Adapter, result: Adapter, tolerance: float) -> float:
    """The largest difference over all modules. Raises ModelError, naming the module, if one is missing, added or further off.

    A module that adds nothing may be on one side alone: half of a fused weight has no other way to stay as it is.
    """
    everything = {**source.modules, **result.modules}
    for path in sorted(set(source.modules) ^ set(result.modules)):
        if everything[path].magnitude is not None or everything[path].b.raw.any():
            raise ModelError(f"self-check failed: {path} is only on one side of the conversion. Nothing was written; please report it.")
    worst = 0.0
    for path in sorted(set(source.modules) & set(result.modules)):
        module = source.modules[path]
        found = max(difference(module, result.modules[path]), _magnitude_gap(module.magnitude, result.modules[path].magnitude))
        if not found <= tolerance:
            raise ModelError(
                f"self-check failed: {path}: scale * B * A or its magnitude differs by {found:.2g} (relative; at most {tolerance:.0e} is allowed). "
                "Nothing was written."
            )
        worst = max(worst, found)
    return worst


def _magnitude_gap(one: Tensor | None, other: Tensor | None) -> float:
    if one is None or other is None:
        return 0.0 if one is other else float("inf")
    if one.shape != other.shape:
        return float("inf")
    a, b = one.values(), other.values()
    size = float(np.abs(a).max(initial=0.0))
    return float(np.abs(a - b).max(initial=0.0)) / size if size else float(np.abs(b).max(initial=0.0))
