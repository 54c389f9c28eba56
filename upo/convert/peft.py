"""PEFT's layout: adapter_config.json and adapter_model.safetensors, read whole and written so that stock peft and vLLM load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from upo.adapters import PREFIX, WEIGHTS, peft_config
from upo.convert import experts
from upo.convert.adapter import Adapter, Module, Tensor, difference, trimmed
from upo.convert.base import Base
from upo.convert.families import TAKEN_FOR_EXPERTS, is_embedding, is_head, present, to_mlx
from upo.convert.files import CONFIG, Files, number, text, whole, words
from upo.convert.patterns import check_targeted, matching
from upo.errors import ModelError

METADATA = {"format": "pt"}
_SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",  # peft 0.11 to 0.13
}
# Options that do not change what the trained arrays mean, or that are dealt with below.
_READ = {
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules",
    "target_parameters", "layers_to_transform", "layers_pattern", "exclude_modules", "lora_dropout", "ensure_weight_tying", "init_lora_weights",
}  # fmt: skip
_INDIFFERENT = {
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "fan_in_fan_out", "megatron_config", "megatron_core",
    "eva_config", "qalora_group_size", "runtime_config", "base_model_class", "parent_library",
}  # fmt: skip
# What this library cannot say in other words, with a description.
_REFUSED = {
    "bias": "trained biases",
    "lora_bias": "biases inside LoRA",
    "modules_to_save": "fully trained modules",
    "trainable_token_indices": "trained token embeddings",
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "layer_replication": "replicated layers",
    "use_qalora": "QALoRA",
    "loftq_config": "LoftQ",
    "corda_config": "CorDA",
    "lora_ga_config": "LoRA-GA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
}
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # initialisations that leave the base weights alone
_TYING = "peft's ensure_weight_tying=True, with which it trains one adapter for both"


@dataclass(frozen=True)
class _Options:
    """The options that say what the arrays mean, checked."""

    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, Any]  # pattern -> rank
    alphas: Mapping[str, Any]
    dora: bool
    tying: bool
    config: Mapping[str, Any]

    def of(self, where: str, path: str) -> tuple[int, float]:
        """Rank and scale of the module or parameter at this path."""
        rank = whole(where, "rank_pattern", matching(where, "rank_pattern", self.ranks, path, self.rank))
        alpha = number(where, "alpha_pattern", matching(where, "alpha_pattern", self.alphas, path, self.alpha))
        return rank, alpha / rank**0.5 if self.rslora else alpha / rank


def read(files: Files, base: Base) -> Adapter:
    """The adapter in these files. Raises ModelError, with the name and the reason, for anything peft would apply and we could not carry,
    or would not apply at all."""
    where = f"{files.where}/{CONFIG}"
    options = _options(where, files.config)
    parts, notes = _sort(files, base)
    targets = words(where, "target_parameters", files.config.get("target_parameters"))
    modules: dict[str, Module] = {}
    stacked: dict[str, dict[str, Tensor]] = {}
    for path, found in parts.items():
        if path.rpartition(".")[2] in ("experts", "base_layer"):
            stacked[path] = found
        else:
            modules[path] = _module(files.where, path, found, options, targets)
    # With ensure_weight_tying peft adapts the head too, and names the embedding alone.
    check_targeted(where, files.config, [path for path in modules if not (options.tying and is_head(path))], targets)
    modules = {present(path, base.model_type): module for path, module in modules.items()}
    modules = experts.gathered(files.where, modules, base) | experts.from_peft(files.where, stacked, targets, options.of, base)
    if not modules:
        raise ModelError(f"{files.where}/{WEIGHTS}: holds no LoRA weights.")
    modules = _tied(files.where, modules, options.tying, base)
    return Adapter(text(where, "base_model_name_or_path", files.config.get("base_model_name_or_path")), modules, _dropout(where, files.config), tuple(notes))


def _options(where: str, config: Mapping[str, Any]) -> _Options:
    kind = config.get("peft_type")
    if str(kind).upper() != "LORA":
        raise ModelError(f"{where}: peft_type is {ascii(kind)[:60]}; only LORA can be converted.")
    for key, value in config.items():
        idle = value in (None, False, "none") or value == [] or value == {}
        if key in _REFUSED and not idle:
            raise ModelError(f"{where}: {key}: adapters with {_REFUSED[key]} cannot be carried. Merge it into its model with peft instead.")
        if key not in _READ | _INDIFFERENT | set(_REFUSED) and not idle:
            raise ModelError(f"{where}: {ascii(key)[:60]} is an option this version does not know, and it is in use. Refused, as it may change what the weights mean.")
    init = config.get("init_lora_weights", True)
    if not any(init is known or (isinstance(known, str) and init == known) for known in _KEEPS_BASE):
        raise ModelError(
            f"{where}: init_lora_weights = {ascii(init)[:60]} changed the base weights too. Convert the adapter with peft first: "
            "save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    for key in ("use_rslora", "use_dora", "ensure_weight_tying"):
        if not isinstance(config.get(key, False), (bool, type(None))):
            raise ModelError(f"{where}: {key} must be true or false.")
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key) is not None and not isinstance(config[key], dict):
            raise ModelError(f"{where}: {key} must be a mapping.")
    return _Options(
        whole(where, "r", config.get("r")),
        number(where, "lora_alpha", config.get("lora_alpha")),
        bool(config.get("use_rslora")),
        config.get("rank_pattern") or {},
        config.get("alpha_pattern") or {},
        bool(config.get("use_dora")),
        bool(config.get("ensure_weight_tying")),
        config,
    )


def _dropout(where: str, config: Mapping[str, Any]) -> float:
    dropout = number(where, "lora_dropout", config.get("lora_dropout", 0.0))
    if not 0 <= dropout < 1:
        raise ModelError(f"{where}: lora_dropout must be at least 0 and below 1 (got {dropout:g}).")
    return dropout


def _sort(files: Files, base: Base) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Tensors by module path and part; and notes on copies of base weights that were left out."""
    parts: dict[str, dict[str, Tensor]] = {}
    notes = []
    for name, tensor in sorted(files.tensors.items()):
        where = f"{files.where}/{WEIGHTS}: {name}"
        if not name.startswith(PREFIX):
            raise ModelError(f"{where}: does not begin with {PREFIX}; peft would not apply it, and would not say so. Refused.")
        path = name.removeprefix(PREFIX)
        suffix = next((s for s in sorted(_SUFFIXES, key=len, reverse=True) if path.endswith(s)), None)
        if suffix:
            found = parts.setdefault(path.removesuffix(suffix), {})
            if _SUFFIXES[suffix] in found:
                raise ModelError(f"{where}: there twice, under two spellings.")
            found[_SUFFIXES[suffix]] = tensor
        elif path.endswith(".weight") and (is_embedding(plain := path.removesuffix(".weight").removesuffix(".base_layer")) or is_head(plain)):
            _check_copy(where, plain, tensor, base)
            notes.append(f"{name}: a copy of the base model's own weight, as peft keeps one; left out.")
        else:
            raise ModelError(f"{where}: is no LoRA weight, so it cannot be carried. Refused.")
    return parts, notes


def _check_copy(where: str, path: str, tensor: Tensor, base: Base) -> None:
    """Raise ModelError unless the tensor is the base's own weight."""
    if base.folder is None:
        raise ModelError(f"{where}: a whole weight beside the adapter: a copy of the base's (peft saves one of an adapted embedding), or trained. Tell which: --base MODEL.")
    spellings = {path, to_mlx(present(path, base.model_type), base.model_type)}  # the hub keeps some families under the names that mlx-lm has
    own = next((w for name in sorted(spellings) if (w := base.weight(f"{name}.weight")) is not None), None)
    if own is None and is_head(path):  # tied, on disk once
        own = next((w for name in base.shapes if is_embedding(name.removesuffix(".weight")) and (w := base.weight(name)) is not None), None)
    if own is None or own.shape != tensor.shape or not np.array_equal(own.astype(np.float64), tensor.values()):
        raise ModelError(f"{where}: a whole weight that differs from the base's in {base.folder}: resized or fully trained. It cannot be carried; merge it into its model with peft.")


def _module(where: str, path: str, found: dict[str, Tensor], options: _Options, parameters: list[str]) -> Module:
    """A linear layer or an embedding, checked against the configuration."""
    where = f"{where}/{WEIGHTS}: {path}"
    embedding = "embedding_A" in found or "embedding_B" in found
    wanted = {"embedding_A", "embedding_B"} if embedding else {"A", "B"}
    if missing := wanted - set(found):
        raise ModelError(f"{where}: lora_{min(missing)} is missing.")
    if odd := set(found) - wanted - {"magnitude"}:
        raise ModelError(f"{where}: has both lora_{min(odd)} and lora_{min(wanted)}.")
    a, b = (found[side] for side in sorted(wanted))
    # peft looks a bare parameter's rank up under the parameter's own name
    key = next((f"{path}.weight" for t in parameters if f".{path}.weight".endswith(f".{t}")), path)
    rank, scale = options.of(where, key)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise ModelError(f"{where}: A {list(a.shape)} and B {list(b.shape)} do not fit rank {rank} of {CONFIG}.")
    magnitude = found.get("magnitude")
    if (magnitude is not None) != options.dora:
        raise ModelError(f"{where}: {'has' if magnitude is not None else 'lacks'} a magnitude, and use_dora is {str(options.dora).lower()}.")
    if magnitude is not None:
        if embedding:
            raise ModelError(f"{where}: DoRA on an embedding cannot be carried: peft gives each dimension a magnitude, mlx-lm each token.")
        if magnitude.shape != (b.shape[0],):
            raise ModelError(f"{where}: magnitude {list(magnitude.shape)} does not fit B {list(b.shape)}.")
    return Module("embedding" if embedding else "linear", a, b, scale, magnitude)


def _tied(where: str, modules: dict[str, Module], tying: bool, base: Base) -> dict[str, Module]:
    """Embedding and head of a tied model as one module; refused where they are two."""
    embedding = next((path for path, module in modules.items() if module.kind == "embedding"), None)
    head = next((path for path in modules if is_head(path)), None)
    if embedding is None and head is None:
        return modules
    if base.tied is None:
        raise ModelError(f"{where}: adapts {embedding or head}; whether the model ties its head to its embeddings decides what that means. Name it: --base MODEL.")
    if not base.tied:
        return modules
    if embedding is None or head is None:
        raise ModelError(
            f"{where}: adapts {embedding or head} alone, but {base.folder} ties embeddings and head, and mlx-lm adapts both or none. "
            f"It cannot be carried. Train with {_TYING}."
        )
    one, two = modules[embedding], modules[head]
    swapped = replace(two, kind="embedding", a=two.b.moved(np.transpose), b=two.a.moved(np.transpose))
    if not tying or difference(one, swapped) > 1e-6:
        raise ModelError(f"{where}: adapts {embedding} and {head}, which {base.folder} ties, in two ways; mlx-lm has one for both. It cannot be carried. Train with {_TYING}.")
    return {path: replace(module, tied=True) if path == embedding else module for path, module in modules.items() if path != head}


def write(adapter: Adapter, base: Base, trim: bool = True) -> tuple[Files, list[str]]:
    """The files of an adapter, and notes. Ranks and scales that differ become patterns; zero padding of ranks goes, if `trim`.

    Raises ModelError for what peft cannot hold, or would apply otherwise.
    """
    notes: list[str] = []
    modules = {path: trimmed(module) if trim else module for path, module in adapter.modules.items()}
    arrays: dict[str, Tensor] = {}
    entries: dict[str, Module] = {}
    parameters: list[str] = []
    for path, module in modules.items():
        if module.kind != "experts":
            _check_writable(path, module, base)
            arrays |= _arrays(path, module)
            entries[path] = module
            if experts.is_router(path, base):
                entries[f"{path}.weight"] = entries.pop(path)
                parameters.append(f"{path}.weight")
            if module.tied:
                head = replace(module, kind="linear", a=module.b.moved(np.transpose), b=module.a.moved(np.transpose), tied=False)
                arrays |= _arrays("lm_head", head)
                entries["lm_head"] = head
    fused = experts.fused(modules)
    if fused:
        if adapter.dora:
            raise ModelError("DoRA on mixture-of-experts weights: peft has none. It cannot be carried.")
        for path, module in fused.items():
            entries[path] = module
            parameters.append(path)
        arrays |= {f"{PREFIX}{name}": tensor for name, tensor in experts.to_peft(fused).items()}
    dropout = adapter.dropout
    if parameters and dropout:
        notes.append(f"dropout {dropout:g} became 0: peft has none on bare parameters (experts, router). At inference it is off anyway.")
        dropout = 0.0
    config = _config(adapter, base, entries, parameters) | {"lora_dropout": dropout}
    return Files(config, arrays), notes


def _check_writable(path: str, module: Module, base: Base) -> None:
    name = path.rpartition(".")[2]
    if base.model_type in TAKEN_FOR_EXPERTS and module.kind == "linear" and name in ("gate_proj", "up_proj", "down_proj"):
        raise ModelError(f"{path}: peft takes a module of this name in {base.model_type} for the routed experts when it loads it. It cannot be carried.")
    if module.magnitude is not None and module.kind == "embedding":
        raise ModelError(f"{path}: DoRA on an embedding cannot be carried: mlx-lm gives each token a magnitude, peft each dimension.")


def _arrays(path: str, module: Module) -> dict[str, Tensor]:
    names = ("lora_embedding_A", "lora_embedding_B") if module.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
    arrays = {f"{PREFIX}{path}.{names[0]}": module.a, f"{PREFIX}{path}.{names[1]}": module.b}
    if module.magnitude is not None:
        arrays[f"{PREFIX}{path}.lora_magnitude_vector"] = module.magnitude
    return arrays


def _config(adapter: Adapter, base: Base, entries: Mapping[str, Module], parameters: list[str]) -> dict[str, Any]:
    """adapter_config.json; what most entries have is the rule, the others are named by full path."""
    kinds = [(module.rank, _alpha(module)) for module in entries.values()]
    rank, alpha = max(sorted(set(kinds)), key=kinds.count)
    linear = [path for path in entries if path not in parameters]
    config = peft_config(adapter.base_model, rank, alpha, linear, base.layers)
    config["use_dora"] = adapter.dora
    config["rank_pattern"] = {f"^{re.escape(path)}": m.rank for path, m in entries.items() if m.rank != rank}
    config["alpha_pattern"] = {f"^{re.escape(path)}": _json(_alpha(m)) for path, m in entries.items() if _alpha(m) != alpha}
    if not linear:
        config["target_modules"] = []
    if parameters:
        config["target_parameters"] = sorted(parameters)
    if any(module.tied for module in entries.values()):
        config["ensure_weight_tying"] = True
    return config


def _alpha(module: Module) -> float:
    """scale * r, a whole number where that gives the same scale: vLLM and llama.cpp read it as one."""
    alpha = module.scale * module.rank
    return float(round(alpha)) if round(alpha) / module.rank == module.scale else alpha


def _json(alpha: float) -> float | int:
    return int(alpha) if alpha.is_integer() else alpha
