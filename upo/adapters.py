"""LoRA adapters on disk, in PEFT's layout: adapter_config.json beside adapter_model.safetensors.

Parameter names are `base_model.model.<module path>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r], float32 in memory. What the two
backends cannot apply alike is refused by name, never dropped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from upo import tensors
from upo.errors import ModelError, RunError
from upo.models import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

# PEFT options that change what the arrays mean, with the value that leaves them alone.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_dora": ((None, False), "DoRA"),
    "bias": ((None, "none"), "trained biases"),
    "lora_bias": ((None, False), "biases inside LoRA"),
    "modules_to_save": ((None, []), "fully trained modules"),
    "rank_pattern": ((None, {}), "ranks per module"),
    "alpha_pattern": ((None, {}), "alphas per module"),
    "target_parameters": ((None, []), "LoRA on bare parameters (mixture-of-experts weights)"),
    "trainable_token_indices": ((None, [], {}), "trained token embeddings"),
    "alora_invocation_tokens": ((None, []), "activated LoRA"),
    "layer_replication": ((None, []), "replicated layers"),
    "fan_in_fan_out": ((None, False), "weights stored as (in, out)"),
    "use_qalora": ((None, False), "QALoRA"),
}
# Initialisations that also change the base weights; the adapter alone does not say how.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: W x + scale * B (A x) for every target."""

    rank: int
    alpha: float
    scale: float  # alpha / rank, or alpha / sqrt(rank) for rsLoRA
    targets: tuple[str, ...]  # full module paths in the base model, sorted
    arrays: dict[str, np.ndarray]  # PEFT name -> float32
    base_model: str | None
    config: dict[str, Any]


def lora_name(module: str, side: str) -> str:
    """PEFT's name of a parameter: side "A" or "B" of the module at this path."""
    return f"{PREFIX}{module}.lora_{side}.weight"


def modules_of(names: Iterable[str]) -> list[str]:
    """Paths of the modules that parameters of these PEFT names belong to, sorted."""
    return sorted(name.removeprefix(PREFIX).removesuffix(".lora_A.weight") for name in names if name.endswith(".lora_A.weight"))


def read_adapter(folder: Path | str) -> Adapter:
    """Read an adapter. A upo run or checkpoint is looked into. Raises ModelError naming the file, the reason and the remedy."""
    folder = _locate(Path(folder).expanduser())
    config = read_json(folder / CONFIG)
    rank, alpha = _check_config(folder / CONFIG, config)
    path = folder / WEIGHTS
    if not path.exists():
        if (folder / "adapter_model.bin").exists():
            raise ModelError(
                f"{folder / 'adapter_model.bin'}: a pickle, which can run code when opened. Save the adapter again with peft; it writes {WEIGHTS}."
            )
        raise ModelError(f"{path}: missing. An adapter folder holds {CONFIG} and {WEIGHTS}.")
    arrays = {name: array.astype(np.float32, copy=False) for name, array in sorted(tensors.read(path).items())}
    targets = _check_arrays(str(path), arrays, rank)
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    return Adapter(rank, alpha, scale, targets, arrays, config.get("base_model_name_or_path"), config)


def _locate(folder: Path) -> Path:
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such adapter folder.")
    if (folder / CONFIG).exists() and not (folder / "adapters.safetensors").exists():
        return folder
    if (folder / "adapter" / CONFIG).exists():
        return folder / "adapter"
    if (folder / "checkpoints").is_dir():
        raise ModelError(
            f"{folder}: this run has no finished adapter. Name one of its checkpoints ({folder / 'checkpoints'}/step-...), or resume it."
        )
    if (folder / "adapters.safetensors").exists() and not (folder / WEIGHTS).exists():
        raise ModelError(
            f"{folder}: an mlx-lm adapter (adapters.safetensors). Turn it into one that a run takes: upo convert {folder} --to upo --out NEW"
        )
    if (folder / CONFIG).exists():
        return folder
    raise ModelError(
        f"{folder}: no adapter here ({CONFIG} is missing). Give a PEFT adapter, a upo run or one of its checkpoints."
    )


def _check_config(path: Path, config: Mapping[str, Any]) -> tuple[int, float]:
    kind = config.get("peft_type")
    if str(kind).upper() != "LORA":
        raise ModelError(f"{path}: peft_type is {kind}; only LORA is supported.")
    for key, (harmless, meaning) in _REFUSED.items():
        if config.get(key) not in harmless:
            remedy = f" Make them one: upo convert {path.parent} --to upo --out NEW" if key.endswith("_pattern") else ""
            raise ModelError(f"{path}: {key} = {json.dumps(config[key])}: adapters with {meaning} are not supported.{remedy}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise ModelError(
            f"{path}: init_lora_weights = {init} changed the base weights too. Convert the adapter first "
            "(peft: save_pretrained(path_initial_model_for_weight_conversion=...))."
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise ModelError(f"{path}: r must be a whole number above 0 (got {rank!r}).")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not np.isfinite(alpha):
        raise ModelError(f"{path}: lora_alpha must be a number (got {alpha!r}).")
    return rank, float(alpha)


def _check_arrays(where: str, arrays: Mapping[str, np.ndarray], rank: int) -> tuple[str, ...]:
    """The module paths; every one has an A [rank, in] and a B [out, rank], all finite."""
    modules: dict[str, set[str]] = {}
    for name, array in arrays.items():
        match = _NAME.fullmatch(name)
        if not match:
            raise ModelError(
                f"{where}: {name}: not a LoRA weight of the form {lora_name('<module>', 'A')}; it would not be applied. Refused."
            )
        module, side = match["module"], match["side"]
        if array.ndim != 2 or array.shape[0 if side == "A" else 1] != rank:
            raise ModelError(f"{where}: {name}: shape {list(array.shape)} does not fit rank {rank}.")
        if not np.isfinite(array).all():
            raise ModelError(f"{where}: {name}: holds NaN or infinity.")
        modules.setdefault(module, set()).add(side)
    for module, sides in modules.items():
        if len(sides) != 2:
            raise ModelError(f"{where}: {lora_name(module, 'A' if 'B' in sides else 'B')}: missing, its other half is there.")
    if not modules:
        raise ModelError(f"{where}: holds no LoRA weights.")
    return tuple(sorted(modules))


def write_adapter(
    folder: Path | str, arrays: Mapping[str, np.ndarray], config: Mapping[str, Any], overwrite: bool = False
) -> None:
    """Write an adapter in PEFT's layout, whole or not at all: into a temporary folder beside it, synced, then renamed.

    Raises RunError if the folder exists and `overwrite` is False, ModelError if arrays and config do not fit one another.
    """
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise RunError(f"{folder}: exists already. Choose another folder; nothing was written.")
    _check_arrays(str(folder), arrays, int(config["r"]))
    with new_folder(folder) as temporary:
        tensors.write(temporary / WEIGHTS, arrays, metadata={"format": "pt"})
        with (temporary / CONFIG).open("w", encoding="utf-8") as file:
            file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block is left, whole or not at all; after an error both are as before."""
    temporary, old = (folder.with_name(f".{folder.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def peft_config(
    base_model: str | None, rank: int, alpha: float, targets: Sequence[str], layers: int | None = None
) -> dict[str, Any]:
    """adapter_config.json for an adapter on these modules (full paths), as `peft.PeftModel.from_pretrained` and vLLM read it.

    `layers` is the model's number of decoder layers: where the targets cover all of them alike, they are written as short names
    (["q_proj", "v_proj"]), otherwise, or without it, as full paths.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else float(alpha),
        "lora_dropout": 0.0,
        "target_modules": (_short_names(targets, layers) if layers else None) or sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _short_names(targets: Sequence[str], layers: int) -> list[str] | None:
    """The last parts of the paths, if each of them occurs once in every one of the layers 0 .. n-1 and nowhere else."""
    found: dict[str, list[int]] = {}
    for target in targets:
        match = re.fullmatch(r"[^0-9]*\.(\d+)\.(?:.*\.)?([^.]+)", target)
        if not match:
            return None
        found.setdefault(match[2], []).append(int(match[1]))
    return sorted(found) if all(sorted(indices) == list(range(layers)) for indices in found.values()) else None
