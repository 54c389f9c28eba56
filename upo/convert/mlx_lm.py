"""mlx-lm's layout: adapter_config.json and adapters.safetensors, read whole and written so that stock mlx-lm loads it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from upo.convert import experts
from upo.convert.adapter import Adapter, Module, Tensor, uniform
from upo.convert.base import Base
from upo.convert.families import is_embedding, is_head, to_hf, to_mlx
from upo.convert.files import CONFIG, Files, number, text, whole, words
from upo.errors import ModelError

WEIGHTS = "adapters.safetensors"
METADATA = {"format": "mlx"}
_IN_BLOCK = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.(.+)$")  # number of the block, path in it
_PARTS = {"lora_a", "lora_b", "m"}


def read(files: Files, base: Base) -> Adapter:
    """The adapter in these files. Raises ModelError, with the name and the reason, for what mlx-lm would not apply or we could not carry."""
    where = f"{files.where}/{CONFIG}"
    kind = files.config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise ModelError(f"{where}: fine_tune_type is {ascii(kind)[:60]}; only lora and dora are adapters. Fuse it into its model with mlx_lm.fuse instead.")
    options = files.config.get("lora_parameters")
    if not isinstance(options, dict):
        raise ModelError(f"{where}: lora_parameters is missing or no mapping; it says rank and scale.")
    rank = whole(where, "lora_parameters.rank", options.get("rank"))
    scale = number(where, "lora_parameters.scale", options.get("scale"))
    dropout = number(where, "lora_parameters.dropout", options.get("dropout", 0.0))
    if not 0 <= dropout < 1:
        raise ModelError(f"{where}: lora_parameters.dropout must be at least 0 and below 1 (got {dropout:g}).")
    notes = []
    if "alpha" in options:
        notes.append(f"{where}: lora_parameters.alpha is not used by mlx-lm, and not here: scale is {scale:g}.")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(files.tensors.items()):
        path, _, part = name.rpartition(".")
        if part not in _PARTS or not path:
            raise ModelError(f"{files.where}/{WEIGHTS}: {name}: is no LoRA weight, so it cannot be carried. Refused.")
        parts.setdefault(path, {})[part] = tensor
    _check_targeted(where, files.config, options, list(parts), base)
    modules = {}
    for path, found in parts.items():
        own, module = _module(f"{files.where}/{WEIGHTS}", path, found, rank, scale, kind == "dora", base)
        if own in modules:
            raise ModelError(f"{files.where}/{WEIGHTS}: {path}: another name leads to the same module, {own}.")
        modules[own] = module
    return Adapter(text(where, "model", files.config.get("model")), modules, dropout, tuple(notes))


def _check_targeted(where: str, config: Mapping[str, Any], options: Mapping[str, Any], paths: Sequence[str], base: Base) -> None:
    """Raise ModelError for weights of a module that mlx-lm, by `keys` and `num_layers`, gives no adapter."""
    keys = set(words(where, "lora_parameters.keys", options.get("keys")))
    count = config.get("num_layers")
    if type(count) is not int:
        raise ModelError(f"{where}: num_layers must be a whole number (got {ascii(count)[:60]}).")
    first = base.layers - count if base.layers is not None and count > 0 else 0
    for path in paths:
        match = _IN_BLOCK.search(path)
        by_block = match is not None and int(match[1]) >= first and (not keys or match[2] in keys)
        if not by_block and path not in keys:
            raise ModelError(f"{where}: there are weights for {path}, which keys and num_layers leave out; mlx-lm would not apply them. Refused.")


def _module(where: str, path: str, found: Mapping[str, Tensor], rank: int, scale: float, dora: bool, base: Base) -> tuple[str, Module]:
    """transformers' path and the module, in the neutral orientation."""
    wanted = {"lora_a", "lora_b", "m"} if dora else {"lora_a", "lora_b"}
    if set(found) != wanted:
        raise ModelError(f"{where}: {path}: has {', '.join(sorted(found))}; {'DoRA' if dora else 'LoRA'} has {', '.join(sorted(wanted))}.")
    a, b, magnitude = found["lora_a"], found["lora_b"], found.get("m")
    if len(a.shape) == 3:
        place = experts.layout(f"{where}: {path}", base)
        match = re.fullmatch(rf"(.*\.layers\.\d+)\.{re.escape(place.mlx)}\.(gate_proj|up_proj|down_proj)", path)
        fits = len(b.shape) == 3 and a.shape[0] == b.shape[0] and a.shape[1] == b.shape[2] == rank and magnitude is None
        if not match or not fits or (base.experts is not None and a.shape[0] != base.experts):
            raise ModelError(f"{where}: {path}: lora_a {list(a.shape)} and lora_b {list(b.shape)} are no experts of {base.model_type} at rank {rank}. Refused.")
        return f"{match[1]}.{place.hf}.{match[2]}", Module("experts", a, b, scale)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != rank or b.shape[0] != rank:
        raise ModelError(f"{where}: {path}: lora_a {list(a.shape)} and lora_b {list(b.shape)} do not fit rank {rank} of {CONFIG}.")
    own = to_hf(path, base.model_type)
    embedding = is_embedding(own)
    if magnitude is not None and magnitude.shape != (a.shape[0] if embedding else b.shape[1],):
        raise ModelError(f"{where}: {path}: magnitude {list(magnitude.shape)} does not fit lora_a {list(a.shape)} and lora_b {list(b.shape)}.")
    if embedding and base.tied is None:
        raise ModelError(f"{where}: adapts {path}, which in a model with a tied output head changes that too. Whether it is tied says --base MODEL.")
    if is_head(own) and base.tied:
        raise ModelError(f"{where}: adapts {path}, but {base.folder} has no head of its own. Is this the model it was trained on?")
    a, b = a.moved(np.transpose), b.moved(np.transpose)
    return own, Module("embedding" if embedding else "linear", a, b, scale, magnitude, tied=embedding and bool(base.tied))


def write(adapter: Adapter, base: Base) -> tuple[Files, list[str]]:
    """The files of an adapter, and notes. mlx-lm has one rank and one scale: smaller ranks are padded, other scales go into B."""
    modules, rank, scale, notes = uniform(adapter.modules)
    arrays: dict[str, Tensor] = {}
    paths: list[str] = []
    for own, module in modules.items():
        path = _path(own, module, base)
        if module.magnitude is not None and module.kind != "linear":
            raise ModelError(f"{own}: DoRA on an embedding or on experts cannot be carried: the two libraries mean different things by it.")
        turn = module.kind != "experts"
        arrays[f"{path}.lora_a"] = module.a.moved(np.transpose) if turn else module.a
        arrays[f"{path}.lora_b"] = module.b.moved(np.transpose) if turn else module.b
        if module.magnitude is not None:
            arrays[f"{path}.m"] = module.magnitude
        paths.append(path)
    keys, layers = _keys(paths, base.layers)
    config = {
        "model": adapter.base_model,
        "fine_tune_type": "dora" if adapter.dora else "lora",
        "num_layers": layers,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": adapter.dropout, "keys": keys},
    }
    if adapter.dora and adapter.dropout:
        notes.append("DoRA with dropout: mlx-lm trains it by another formula than peft. At inference they are the same.")
    return Files(config, arrays), notes


def _path(own: str, module: Module, base: Base) -> str:
    if module.kind != "experts":
        return to_mlx(own, base.model_type)
    place = experts.layout(own, base)
    owner, _, name = own.rpartition(".")
    return f"{owner.removesuffix(place.hf)}{place.mlx}.{name}"


def _keys(paths: Sequence[str], layers: int | None) -> tuple[list[str], int]:
    """`keys` and `num_layers`: relative to a block where the last blocks are adapted alike, as mlx-lm itself writes them; else full paths,
    for which it has room too."""
    by_layer: dict[int, set[str]] = {}
    full = []
    for path in paths:
        match = _IN_BLOCK.search(path)
        if match:
            by_layer.setdefault(int(match[1]), set()).add(match[2])
        else:
            full.append(path)
    alike = len({frozenset(names) for names in by_layer.values()}) == 1
    if layers is None or not alike or sorted(by_layer) != list(range(layers - len(by_layer), layers)):
        return sorted(paths), -1
    return sorted(by_layer[layers - 1]) + sorted(full), len(by_layer)
