"""What a conversion must know of the base model, from its configuration and safetensors headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from upo import tensors
from upo.convert.adapter import Module
from upo.convert.families import EXPERTS, HEADS, PREFIXES, SAME, SAME_LINEAR, is_embedding, is_head
from upo.errors import ModelError
from upo.models import is_quantized_mlx, model_config, weight_files


@dataclass(frozen=True)
class Base:
    """Facts about a base model. Unknown ones are None."""

    folder: Path | None
    model_type: str | None
    tied: bool | None  # whether the output head is the embedding
    layers: int | None
    hidden: int | None  # width of the hidden states
    experts: int | None  # routed experts of a layer
    shapes: Mapping[str, tuple[int, ...]]  # of its weights by name; empty if unknown or packed by a quantisation

    @property
    def has_known_names(self) -> bool:
        return self.model_type in {*SAME, *SAME_LINEAR, *PREFIXES, *EXPERTS}

    def weight(self, name: str) -> np.ndarray | None:
        """A weight in float32 (float64 if it is stored so), or None."""
        for path in weight_files(self.folder) if self.folder else []:
            if name in tensors.read_header(path).entries:
                return tensors.read(path, [name])[name]
        return None


UNKNOWN = Base(None, None, None, None, None, None, {})


def read_base(folder: Path) -> Base:
    """Facts of a model folder, in HF or mlx-lm layout. Raises ModelError if it is none. Nothing of it is loaded: it may ask for code."""
    config, _ = model_config(folder)
    nested = config.get("text_config")
    text: Mapping[str, Any] = nested if isinstance(nested, dict) else config
    shapes = {name: entry.shape for path in weight_files(folder) for name, entry in tensors.read_header(path).entries.items()}
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    if not isinstance(tied, bool):  # left at the family's default: the weights say what that is
        tied = not any(name.removesuffix(".weight").rpartition(".")[2] in HEADS for name in shapes)
    return Base(
        folder,
        str(config["model_type"]) if config.get("model_type") else None,
        tied,
        _whole(text, "num_hidden_layers", "n_layer"),
        _whole(text, "hidden_size", "n_embd"),
        _whole(text, "num_experts", "num_local_experts", "n_routed_experts"),
        {} if is_quantized_mlx(config) or config.get("quantization_config") else shapes,
    )


def _whole(config: Mapping[str, Any], *keys: str) -> int | None:
    return next((config[key] for key in keys if type(config.get(key)) is int), None)


def check_fits(base: Base, modules: Mapping[str, Module]) -> None:
    """Raise ModelError unless every module is a weight of the base, of its shape. Silent where the base's names cannot be compared."""
    if not base.shapes or base.model_type in PREFIXES:
        return
    for path, module in modules.items():
        if module.kind == "experts" or (base.model_type in EXPERTS and f"{path}.weight" not in base.shapes):
            continue  # the hub keeps experts and routers under names of its own
        has = base.shapes.get(f"{path}.weight")
        if has is None and is_head(path) and base.tied:
            continue
        if has is None:
            raise ModelError(f"{base.folder}: has no weight {path}.weight, which the adapter is for. Is this the model it was trained on?")
        wants = (module.a.shape[-1], module.b.shape[-2]) if is_embedding(path) else (module.b.shape[-2], module.a.shape[-1])
        if len(has) == 2 and tuple(has) != wants:
            raise ModelError(f"{base.folder}: {path} is {list(has)}; the adapter is for {list(wants)}. Is this the model it was trained on?")
