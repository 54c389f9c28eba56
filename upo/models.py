"""Model folders: found, checked and described, without a framework.

Both backends and the tokenizer load a model through here, so that one place decides what is safe to open and what its configuration means.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upo.errors import ModelError
from upo.repair import repair_config
from upo.tensors import read_header

# Configuration, tokenizer and safetensors weights: neither code nor pickles, and no second copy of the weights in another layout.
TEXTS = ["*.json", "*.jinja", "*.txt", "*.model"]
WEIGHTS = ["*.safetensors"]
SKIP = ["consolidated*", "original/*", "metal/*", "onnx/*", "openvino/*"]

# Of a model whose logits are not numbers.
NOT_FINITE = "its logits are not finite: the weights hold NaN or infinity, or are too large for float16. Fetch the model again, or try dtype: float32."

_VOLATILE = {
    "_name_or_path",
    "transformers_version",
    "use_cache",
    "torch_dtype",
    "dtype",
}  # of a config: say nothing about the weights


def resolve(model: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a model: `model` if it is one, else the hub's copy of that id, downloaded if need be; checked by `check_folder`.

    Without `weights`, which may be many gigabytes, configuration and tokenizer only are downloaded and checked.
    Raises ModelError if there is no such folder or hub model, the hub cannot be reached or refuses, or the folder is refused.
    """
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        check_folder(folder, weights=weights)
        return folder
    if folder.is_file():
        raise ModelError(f"model: {model} is a file. Give the folder that holds config.json and the .safetensors files.")
    if model.startswith(("/", "./", "../", "~", ".\\")) or model.count("/") > 1 or not model:
        raise ModelError(
            f"model: no such folder: {model!r}. Give an existing folder, or a hub id like HuggingFaceTB/SmolLM2-135M-Instruct."
        )
    folder = _download(model, revision, [*TEXTS, *(WEIGHTS if weights else ())])
    check_folder(folder, weights=weights)
    return folder


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    elsewhere = "or give the folder of a model that is already on this machine"
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=SKIP))
    except errors.GatedRepoError:
        remedy = f"accept its terms at https://huggingface.co/{model} and log in with `hf auth login`"
        raise ModelError(f"model: {model} is gated on the hub: {remedy}, {elsewhere}.") from None
    except errors.RevisionNotFoundError:
        raise ModelError(
            f"revision: {model} has no revision {revision} on the hub. Its branches and commits are at https://huggingface.co/{model}/commits."
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"model: {model} is neither a folder here nor a public model on the hub. Check the spelling, log in with "
            f"`hf auth login` if it is private, {elsewhere}."
        ) from None
    except errors.HFValidationError:
        raise ModelError(f"model: {model} is neither a folder here nor a valid hub id (owner/name).") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        raise ModelError(
            f"model: {model} is not a folder here, not in the hub's cache, and the hub cannot be reached. Connect to the network "
            f"(or unset HF_HUB_OFFLINE), {elsewhere}."
        ) from None
    except (errors.HfHubHTTPError, OSError) as error:
        cause = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ModelError(f"model: {model} could not be downloaded ({cause}). Try again, {elsewhere}.") from None


def check_folder(folder: Path | str, *, weights: bool = True) -> None:
    """Refuse, with ModelError, a folder that is no model, asks for code of its own, has no safe weights (if they are wanted), or points out of itself."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    for name in ("config.json", "tokenizer_config.json"):
        content = config if name == "config.json" else read_json(folder / name) if (folder / name).exists() else {}
        for key in ("auto_map", "model_file"):
            if content.get(key) and not (key == "auto_map" and is_native(name, content)):
                raise ModelError(
                    f"{folder / name}: asks for code of its own (`{key}`), which upo never runs. Use a model that transformers has itself; an "
                    "update may bring it: pip install -U transformers"
                )
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{folder / 'config.json'}: has no `model_type`, which says what kind of model it is. Fetch the model again.")
    inside = _allowed_roots(folder)
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not _within(path, inside):
            raise ModelError(f"{path}: is a link that leads out of the model's folder. Put the file itself there.")
    for path in weight_files(folder) if weights else ():
        read_header(path)  # a download that was cut short is told as such, not as a framework's error


def is_native(name: str, content: dict[str, Any]) -> bool:
    """Whether transformers has the class that this file of a model folder asks for itself, and then needs no code from elsewhere."""
    if name == "config.json":
        from transformers import CONFIG_MAPPING

        return content.get("model_type") in CONFIG_MAPPING
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    return tokenizer_class_from_name(str(content.get("tokenizer_class"))) is not None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping; ModelError names the file if it is missing, broken or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path}: missing. A model folder holds config.json, tokenizer files and .safetensors weights."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}).") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: must hold a JSON mapping.")
    return content


def quantised_by(config: Mapping[str, Any]) -> str:
    """The method by which a model's own files are quantised, in the words of its config.json; "" if they are not."""
    text = config.get("text_config")
    found = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, Mapping) else None)
    return str(found.get("quant_method", "an unknown method")) if isinstance(found, Mapping) else ""


def weight_files(folder: Path | str) -> list[Path]:
    """The safetensors files of a model, in the order of their names: those of the index, or all in the folder where it has no index."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
            found = (
                f" has only pickle weights ({pickles[0]}), which can run code when opened,"
                if pickles
                else " has no .safetensors weights"
            )
            raise ModelError(
                f"{folder}:{found} and upo reads safetensors only. Use a revision with .safetensors, or convert the model with transformers."
            )
        return files
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{index}: has no usable `weight_map`.")
    inside = _allowed_roots(folder)
    files = []
    for name in sorted(set(weight_map.values())):
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{index}: `weight_map` names {name!r}, which is not a .safetensors file inside the folder. Refused."
            )
        if not path.exists():
            raise ModelError(
                f"{path}: missing, though model.safetensors.index.json names it. The download is incomplete: fetch the model again."
            )
        if not _within(path, inside):
            raise ModelError(f"{path}: leads out of the model's folder. Refused.")
        files.append(path)
    if single.exists() and single not in files:
        raise ModelError(
            f"{single}: is beside {index.name}, which does not name it: transformers would read the one, mlx-lm both. Keep one set of "
            "weights in a copy of the folder."
        )
    return files


def check_inside(path: Path, folder: Path) -> None:
    """Raise ModelError if a file of a model folder is really elsewhere."""
    if not _within(path, _allowed_roots(folder)):
        raise ModelError(f"{path}: is or lies behind a link that leads out of the model's folder. Put the file itself there.")


def _allowed_roots(folder: Path) -> list[Path]:
    """The folder itself; for a snapshot in the hub's cache also the blobs of its repository and those shared by the cache."""
    real = folder.resolve()
    repository = real.parent.parent
    if real.parent.name == "snapshots" and repository.name.startswith("models--"):
        return [real, repository / "blobs", repository.parent / "blobs"]
    return [real]


def _within(path: Path, roots: list[Path]) -> bool:
    real = path.resolve()
    return any(real.is_relative_to(root) for root in roots)


def model_config(folder: Path | str) -> tuple[dict[str, Any], list[str]]:
    """config.json, repaired (`repair_config`), and what was repaired, one sentence each.

    Code of the folder's own that nothing needs (`auto_map`, where transformers has the model itself) is left out, and that is told.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    asking = [name for name in ("config.json", "tokenizer_config.json") if (folder / name).exists() and _asks_in_vain(folder / name)]
    if "config.json" in asking:
        config = {key: value for key, value in config.items() if key != "auto_map"}
    config, notes = repair_config(config)
    code = f"{' and '.join(asking)}: code of the model's own (auto_map) is not run, as there is an implementation of {config.get('model_type')} without it."
    return config, [*([code] if asking else []), *notes]


def _asks_in_vain(path: Path) -> bool:
    content = read_json(path)
    return bool(content.get("auto_map")) and is_native(path.name, content)


def is_quantized_mlx(config: dict[str, Any]) -> bool:
    """Whether the weights are in MLX's own group quantisation, which only the MLX backend can read."""
    return isinstance(config.get("quantization"), dict) and "group_size" in config["quantization"]


def weights_hash(folder: Path | str) -> str:
    """16 hex digits that identify the base weights and their architecture, without reading huge files whole.

    SHA-256 over each file's name, size, header and three 4 KiB samples (start, middle, end) of every tensor, and over the repaired config
    without its volatile keys. Samples come from every tensor because a fine-tuned copy may differ in its inner layers only.
    """
    config, _ = model_config(folder)
    digest = hashlib.sha256(json.dumps({k: v for k, v in config.items() if k not in _VOLATILE}, sort_keys=True).encode())
    block = 4096
    for path in weight_files(folder):
        header = read_header(path)
        digest.update(
            f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode() + hashlib.sha256(header.raw).digest()
        )
        with path.open("rb") as file:
            for entry in sorted(header.entries.values(), key=lambda e: e.begin):
                size = entry.end - entry.begin
                starts = (0, (size - block) // 2, size - block) if size > 3 * block else range(0, size, block)
                for start in starts:
                    file.seek(entry.begin + start)
                    digest.update(file.read(min(block, size - start)))
    return digest.hexdigest()[:16]


def context(config: Mapping[str, Any]) -> int | None:
    """Tokens that a model (`config`: its config.json) was made for; None where that is not known, or its positions are stretched."""
    text = config.get("text_config") or config
    limit = text.get("max_position_embeddings") or text.get("n_positions")
    ropes = [text.get("rope_scaling"), text.get("rope_parameters")]
    if any(isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type", "default")) != "default" for rope in ropes):
        return None
    return limit if type(limit) is int else None
