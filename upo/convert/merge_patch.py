"""Which weight of a model each part of an adapter changes, and what comes out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from upo import tensors
from upo.convert.adapter import Adapter, Module
from upo.convert.base import Base
from upo.convert.families import EXPERTS, is_embedding, is_head, to_mlx
from upo.convert.merge_source import FLOATS, Source
from upo.errors import ModelError

_OLD_EXPERTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # Mixtral's names on the hub


@dataclass(frozen=True)
class Patch:
    """W + scale * B A for a weight [..., out, in]: A [E, r, in], B [E, out, r], E = 1 for one matrix; DoRA's magnitude [out]."""

    module: str  # the adapter's, for messages
    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, out, in)."""
        return self.b.shape[0], self.b.shape[1], self.a.shape[2]

    def applied(self, first: int, rows: np.ndarray) -> np.ndarray:
        """The merged rows, for the base's rows from `first` on [n, in], in their dtype."""
        merged = rows.copy()
        out = self.b.shape[1]
        for expert in range(first // out, (first + len(rows) - 1) // out + 1):
            begin, end = max(first, expert * out), min(first + len(rows), (expert + 1) * out)
            b = self.b[expert, begin - expert * out : end - expert * out].astype(rows.dtype)
            part = merged[begin - first : end - first]
            part += (self.scale * b) @ self.a[expert].astype(rows.dtype)
            if self.magnitude is not None:
                norm = np.linalg.norm(part, axis=1)
                part *= (self.magnitude[begin - expert * out : end - expert * out] / norm)[:, None].astype(rows.dtype)
        return merged


@dataclass(frozen=True)
class Plan:
    """What is to be written: for each name the base's weight it comes from, and the patch on it."""

    sources: dict[str, str]
    patches: dict[str, Patch]
    tied: bool | None  # whether the merged model's head is its embedding; None if the base does not say


def plan(adapter: Adapter, base: Base, source: Source) -> Plan:
    """Find every part of the adapter its weight.

    A head or an embedding of a tied model that is adapted alone, or otherwise than the other one, unties them: the head becomes a weight of
    its own. Raises ModelError for a part without a weight, or of another shape.
    """
    sources = {name: name for name in source.weights}
    patches: dict[str, Patch] = {}
    tied = base.tied
    if tied:  # a copy of the head that some checkpoints carry along
        sources = {name: own for name, own in sources.items() if not is_head(name.removesuffix(".weight"))}
    if tied and any((is_head(path) or is_embedding(path)) and not module.tied for path, module in adapter.modules.items()):
        tied = False
        sources[_head_name(adapter)] = _embedding_name(source)
    for path, module in adapter.modules.items():
        for name, patch in _patches(path, module, base, source, sources):
            if name in patches:
                raise ModelError(f"{path} and {patches[name].module} both change {name}. Refused.")
            _check(source, sources[name], name, patch)
            patches[name] = patch
    return Plan(sources, patches, tied)


def _head_name(adapter: Adapter) -> str:
    return f"{next((path for path in adapter.modules if is_head(path)), 'lm_head')}.weight"


def _embedding_name(source: Source) -> str:
    found = [name for name in source.weights if name.endswith(".weight") and is_embedding(name.removesuffix(".weight"))]
    if len(found) != 1:
        raise ModelError(f"{source.folder}: which weight is the embedding that the head is tied to? Found: {', '.join(found) or 'none'}. Refused.")
    return found[0]


def _patches(path: str, module: Module, base: Base, source: Source, names: dict[str, str]) -> Iterator[tuple[str, Patch]]:
    a, b = module.a.values(), module.b.values()
    magnitude = None if module.magnitude is None else module.magnitude.values()
    patch = Patch(path, a.astype(np.float32), b.astype(np.float32), module.scale, magnitude)
    if module.kind == "experts":
        yield from _expert_patches(path, patch, base, source, names)
        return
    if module.kind == "embedding":  # W^T + scale * B A, so W + scale * A^T B^T
        patch = replace(patch, a=patch.b.T, b=patch.a.T)
    patch = replace(patch, a=patch.a[None], b=patch.b[None])
    spellings = [path]
    if base.has_known_names:
        spellings.append(to_mlx(path, base.model_type))
    if base.model_type == "mixtral":  # the router's name on the hub
        spellings.append(path.replace(".mlp.gate", ".block_sparse_moe.gate"))
    yield _one(path, spellings, source, names), patch


def _expert_patches(path: str, patch: Patch, base: Base, source: Source, names: dict[str, str]) -> Iterator[tuple[str, Patch]]:
    """For experts stacked in one weight (mlx-lm), or one weight for each (the hub)."""
    owner, _, name = path.rpartition(".")
    place = EXPERTS[str(base.model_type)]
    layer = owner.removesuffix(place.hf)
    if (stacked := f"{layer}{place.mlx}.{name}.weight") in names:
        yield stacked, patch
        return
    for expert in range(len(patch.a)):
        spellings = [f"{owner}.{expert}.{name}", f"{layer}block_sparse_moe.experts.{expert}.{_OLD_EXPERTS[name]}"]
        yield _one(path, spellings, source, names), replace(patch, a=patch.a[expert : expert + 1], b=patch.b[expert : expert + 1])


def _one(path: str, spellings: list[str], source: Source, names: dict[str, str]) -> str:
    found = [f"{spelling}.weight" for spelling in dict.fromkeys(spellings) if f"{spelling}.weight" in names]
    if len(found) != 1:
        raise ModelError(f"{source.folder}: has no weight {path}.weight, which the adapter is for. Is this the model it was trained on?")
    return found[0]


def _check(source: Source, own: str, name: str, patch: Patch) -> None:
    weight = source.weights[own]
    wanted = patch.shape if patch.shape[0] > 1 or len(weight.shape) == 3 else patch.shape[1:]
    if weight.shape != wanted:
        raise ModelError(f"{source.folder}: {name} is {list(weight.shape)}; the adapter's {patch.module} is for {list(wanted)}. Is this the model it was trained on?")
    if weight.dtype not in FLOATS:
        raise ModelError(f"{source.folder}: {name} is stored as {weight.dtype}, which cannot be added to. Take the base model in bfloat16, float16 or float32.")


def cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rounded once to a stored dtype (bfloat16 as its bits)."""
    if dtype == "BF16":
        return tensors.bf16_from_float32(values)
    with np.errstate(over="ignore"):
        return values.astype(tensors.DTYPES[dtype])
