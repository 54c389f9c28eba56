"""One conversion, from a folder to a new folder: read, turn, check, write, and if asked compare logits."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from upo import adapters
from upo.convert import experts, mlx_lm, peft
from upo.convert.adapter import DTYPES, Adapter, check_equal, uniform
from upo.convert.base import UNKNOWN, Base, check_fits, read_base
from upo.convert.families import check_family, is_head
from upo.convert.files import CONFIG, Files, read_files, write_files
from upo.convert.verify import Verdict, verify
from upo.errors import ModelError, RunError, UpoError
from upo.models import read_json, resolve
from upo.training.checkpoint import read_checkpoint

FORMATS: dict[str, ModuleType] = {"peft": peft, "mlx": mlx_lm, "upo": peft}
# Frobenius, relative, per module: one float32 rounding of B; two roundings (A and B) of 16-bit floats.
TOLERANCE = {None: 1e-6, "F32": 1e-6, "BF16": 1e-2, "F16": 2e-3}


@dataclass(frozen=True)
class Result:
    """What a conversion did."""

    source: Path  # the folder of the adapter itself
    source_format: str  # peft or mlx
    out: Path
    target_format: str  # peft, mlx or upo
    modules: int
    rank: int  # the largest
    dtypes: tuple[str, ...]  # of what was written
    difference: float  # largest relative difference of scale * B * A over the modules
    notes: tuple[str, ...]
    verdict: Verdict | None  # of the logits, if they were compared


def convert(source: Path | str, to: str, out: Path | str, base: str | None = None, dtype: str | None = None, compare: bool = False) -> Result:
    """Write the adapter in `source` (PEFT, mlx-lm, a upo run or checkpoint) to the new folder `out` in the format `to`.

    `base` is the model's folder or hub id, needed where embeddings, head or experts are adapted. `dtype` (float32, bfloat16, float16)
    rounds; without it every bit stays. `compare` computes logits with both stock loaders. Raises UpoError; then nothing is written.
    """
    out = Path(out).expanduser()
    _check_out(out)
    if to not in FORMATS:
        raise UpoError(f"--to {to}: unknown format. Known: {', '.join(FORMATS)}.")
    folder = find(Path(source).expanduser())
    config = read_json(folder / CONFIG)
    kind = kind_of(folder, config)
    facts, notes = _base(base, config, kind, compare)
    reader = FORMATS[kind]
    adapter = reader.read(read_files(folder, reader.WEIGHTS), facts)
    check_fits(facts, adapter.modules)
    crosses = (kind == "mlx") != (to == "mlx")
    notes += [*adapter.notes, *(_name_notes(adapter, facts, compare) if crosses else [])]
    files, more = _written(adapter, to, facts)
    if dtype is not None:
        files = _cast(files, DTYPES[dtype])
    elif wide := sorted(name for name, tensor in files.tensors.items() if tensor.dtype == "F64"):
        raise ModelError(f"{folder}: {wide[0]} is float64, which the frameworks do not keep. Say what it may become: --dtype float32.")
    gap = check_equal(adapter, FORMATS[to].read(files, facts), TOLERANCE[DTYPES[dtype] if dtype else None])
    with adapters.new_folder(out) as temporary:
        write_files(files, temporary, FORMATS[to].WEIGHTS, FORMATS[to].METADATA)
        if to == "upo":
            adapters.read_adapter(temporary)  # what the trainer itself says of it
        verdict = None
        if compare and facts.folder is not None:
            verdict = verify(facts.folder, (kind, folder), ("mlx" if to == "mlx" else "peft", temporary))
        _check_out(out)
    ranks = max(module.rank for module in adapter.modules.values())
    dtypes = tuple(sorted({tensor.dtype for tensor in files.tensors.values()}))
    return Result(folder, kind, out, to, len(adapter.modules), ranks, dtypes, gap, (*notes, *more), verdict)


def find(folder: Path) -> Path:
    """The folder of the adapter itself: the one given, or the result of the upo run it holds.

    Raises ModelError or RunError if there is none, or if a checkpoint's SHA-256 does not fit.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such adapter folder." if not folder.exists() else f"{folder}: is a file. Give the folder of the adapter.")
    if (folder / CONFIG).is_file():
        if (folder / "state.json").is_file():
            read_checkpoint(folder)
        return folder
    if (folder / "adapter" / CONFIG).is_file():
        return folder / "adapter"
    if (folder / "checkpoints").is_dir():
        raise ModelError(f"{folder}: this run has no finished adapter. Name one of its checkpoints ({folder / 'checkpoints'}/step-...), or resume it.")
    if (folder / "config.json").is_file():
        raise ModelError(f"{folder}: a model, not an adapter ({CONFIG} is missing).")
    raise ModelError(f"{folder}: no adapter here ({CONFIG} is missing). Give a PEFT or mlx-lm adapter, a upo run or one of its checkpoints.")


def kind_of(folder: Path, config: dict[str, Any]) -> str:
    if "peft_type" in config:
        return "peft"
    if "lora_parameters" in config or "fine_tune_type" in config or (folder / mlx_lm.WEIGHTS).is_file():
        return "mlx"
    raise ModelError(f"{folder / CONFIG}: neither PEFT's (no peft_type) nor mlx-lm's (no lora_parameters).")


def _check_out(out: Path) -> None:
    if os.path.lexists(out):
        raise RunError(f"--out {out}: exists already. Name another folder; nothing is overwritten.")
    if not out.parent.is_dir():
        raise RunError(f"--out {out}: there is no folder {out.parent}.")


def _base(given: str | None, config: dict[str, Any], kind: str, compare: bool) -> tuple[Base, list[str]]:
    """Facts of the model given, or of the one the adapter names if that is a folder here; and a note if that one cannot be read."""
    if given is not None:
        return read_base(resolve(given)), []
    name = config.get("base_model_name_or_path" if kind == "peft" else "model")
    notes = []
    if isinstance(name, str) and len(name) < 4096 and name.isprintable() and (Path(name) / "config.json").is_file():
        try:
            return read_base(Path(name)), []
        except ModelError as error:
            notes.append(f"the model that the adapter names is of no use: {error}")
    if compare:
        raise ModelError(f"--verify: needs the base model; {notes[0] if notes else 'the adapter names none that is a folder here'}. Name it: --base MODEL.")
    return UNKNOWN, notes


def _name_notes(adapter: Adapter, base: Base, compare: bool) -> list[str]:
    """A note where module names are taken on trust. Raises ModelError for a family that cannot be carried, and for names that are known
    only of a model not at hand, or that nothing would check."""
    check_family(base.model_type)
    if base.model_type is None:
        return _plain_names(adapter)
    if base.has_known_names:
        return []
    if not compare:
        raise ModelError(
            f"model_type {base.model_type}: whether its modules have the same names in transformers and mlx-lm is not known here. Add --verify: "
            "the conversion then stands if the logits agree."
        )
    return [f"model_type {base.model_type}: its module names are taken to be the same in both libraries; the logits decide."]


def _plain_names(adapter: Adapter) -> list[str]:
    for path in adapter.modules:
        parts = path.split(".")
        plain = parts[:2] == ["model", "layers"] and len(parts) == 5 and parts[2].isdigit() and parts[3] in ("self_attn", "mlp")
        if not plain or parts[4] in ("gate", "router"):
            raise ModelError(f"{path}: what this module is called in the other format depends on the model. Name it: --base MODEL.")
    return ["the base model is not at hand: module names are taken as they are and shapes are not compared. Better: --base MODEL."]


def _written(adapter: Adapter, to: str, base: Base) -> tuple[Files, list[str]]:
    if to != "upo":
        return FORMATS[to].write(adapter, base)
    for path, module in adapter.modules.items():
        reason = (
            "DoRA" if module.magnitude is not None
            else f"an adapter on {module.kind}" if module.kind != "linear"
            else "an adapter on the output head" if is_head(path)
            else "an adapter on a router" if experts.is_router(path, base)
            else None
        )  # fmt: skip
        if reason:
            raise ModelError(f"{path}: {reason} is nothing upo trains on. Convert to peft or mlx instead.")
    modules, _, _, notes = uniform(adapter.modules)
    files, more = peft.write(replace(adapter, modules=modules, dropout=0.0), base, trim=False)
    if adapter.dropout:
        more.append(f"dropout {adapter.dropout:g} became 0, the only one upo trains with.")
    return files, notes + more


def _cast(files: Files, dtype: str) -> Files:
    """Rounded. Raises ModelError for numbers the dtype cannot hold."""
    rounded = {name: tensor.cast(dtype) for name, tensor in files.tensors.items()}
    if lost := sorted(name for name, tensor in rounded.items() if not np.isfinite(tensor.values()).all()):
        raise ModelError(f"--dtype: {lost[0]} holds numbers too large for {dtype}. Choose another.")
    return replace(files, tensors=rounded)
