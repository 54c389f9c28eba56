"""A model folder on disk: weights in shards, configuration, and all that travels with them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from upo import tensors
from upo.convert.merge_patch import Plan, cast
from upo.convert.merge_source import FLOATS, Source
from upo.errors import ModelError
from upo.models import check_inside

SHARD = 5 * 10**9  # bytes, as transformers and mlx-lm cut them
# Configuration and weights are written anew; the rest of a model folder goes along as it is.
CARRIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "LICENCE*", "NOTICE*", "additional_chat_templates/*.jinja")
_NOT_CARRIED = ("config.json", "model.safetensors.index.json", "hf_quant_config.json", "adapter_config.json")


class Rounding:
    """How much of an adapter survives the rounding to the base's dtype."""

    def __init__(self) -> None:
        self.lost = self.change = 0.0

    def add(self, base: np.ndarray, merged: np.ndarray, stored: np.ndarray) -> None:
        self.lost += float(np.square(stored - merged, dtype=np.float64).sum())
        self.change += float(np.square(merged - base, dtype=np.float64).sum())

    @property
    def share(self) -> float:
        """||rounding|| / ||change||, Frobenius, over all merged weights; 0 where nothing changed."""
        return (self.lost / self.change) ** 0.5 if self.change else 0.0


def total_size(plan: Plan, source: Source) -> int:
    """Bytes of all weights to be written."""
    return sum(source.bytes_of(own) for own in plan.sources.values())


def write_weights(folder: Path, plan: Plan, source: Source, form: str) -> Rounding:
    """Write every weight, merged where the plan says so, in shards with an index; `form` is pt or mlx, whose names they have.

    Raises ModelError for a number its dtype cannot hold.
    """
    rounding = Rounding()
    sizes = {name: source.bytes_of(own) for name, own in plan.sources.items()}
    shards = _shards(sizes)
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        layout = {}
        for name in names:
            weight = source.weights[plan.sources[name]]
            layout[name] = (weight.dtype, weight.shape, sizes[name])
        tensors.write_streamed(
            folder / file,
            layout,
            lambda name: _pieces(name, plan, source, rounding),
            {"format": form},
        )
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index})
    return rounding


def _shards(sizes: Mapping[str, int]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(sizes):
        if shards[-1] and filled + sizes[name] > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += sizes[name]
    return shards


def _pieces(name: str, plan: Plan, source: Source, rounding: Rounding) -> Iterator[np.ndarray]:
    own, patch = plan.sources[name], plan.patches.get(name)
    weight = source.weights[own]
    if patch is None and weight.packed is None:
        yield from source.raw(own)
        return
    for first, rows in source.rows(own):
        merged = rows if patch is None else patch.applied(first, rows)
        stored = cast(merged, weight.dtype)
        back = tensors.float32_from_bf16(stored) if weight.dtype == "BF16" else stored
        if not np.isfinite(back).all():
            raise ModelError(f"{name}: holds NaN, infinity or a number too large for {weight.dtype}. Nothing was written.")
        if patch is not None:
            rounding.add(rows, merged, back)
        yield stored


def dtype_of(plan: Plan, source: Source) -> str | None:
    """The dtype of most merged weights, in transformers' words."""
    found = [source.weights[plan.sources[name]].dtype for name in plan.patches]
    words = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return words[max(FLOATS, key=found.count)] if found else None


def write_config(folder: Path, config: Mapping[str, Any], plan: Plan, source: Source) -> None:
    """config.json in both spellings, without a quantisation that has been undone."""
    written = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config", "_name_or_path")}
    if source.quantised and (dtype := dtype_of(plan, source)):
        written |= {"dtype": dtype, "torch_dtype": dtype}
    if plan.tied is not None:
        written["tie_word_embeddings"] = plan.tied
        if isinstance(written.get("text_config"), dict) and "tie_word_embeddings" in written["text_config"]:
            written["text_config"] = {**written["text_config"], "tie_word_embeddings": plan.tied}
    write_json(folder / "config.json", written)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Sorted and synced."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def copy_rest(source: Path, folder: Path) -> list[str]:
    """Copy tokenizer, chat templates, generation config, processors and licence; returns their names. Refuses links out of the model."""
    copied = []
    for pattern in CARRIED:
        for path in sorted(source.glob(pattern)):
            name = path.relative_to(source).as_posix()
            if not path.is_file() or name in copied or name in _NOT_CARRIED or name.endswith(".index.json"):
                continue
            check_inside(path, source)
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
            copied.append(name)
    return copied
