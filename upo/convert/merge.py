"""Adapter + base model -> a full model, in HF layout or as mlx-lm writes it. No framework is needed for the former."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from upo import adapters
from upo.backend import get_backend
from upo.config import load_config
from upo.convert import merge_folder, merge_patch
from upo.convert.adapter import Adapter
from upo.convert.base import Base, read_base
from upo.convert.families import SAME, is_embedding, is_head
from upo.convert.files import CONFIG, read_files
from upo.convert.merge_source import Source
from upo.convert.run import FORMATS, find, kind_of
from upo.errors import ModelError, RunError, UpoError
from upo.models import model_config, quantised_by, read_json, resolve, weights_hash
from upo.repair import CLOSED_TO_MLX, WRONG_ON_MLX
from upo.training.files import check_writable, writing

GROUP = 64  # inputs that share a scale when mlx-lm quantises, its own default
TRANSPOSED = ("gpt2",)  # weights [in, out] on disk
ALWAYS_TIED = ("cohere", "cohere2", "gemma", "gemma2")  # mlx-lm has no head of its own for them
_FROM_MLX = "Give the original model in HF layout as --base (the adapter fits it), or --to mlx."


@dataclass(frozen=True)
class Result:
    """What a merge did."""

    out: Path
    layout: str  # hf or mlx
    base: Path
    modules: int
    dtype: str | None  # of the merged weights; with `bits`, before they were quantised
    bits: int | None
    size: int  # bytes of the weights
    rounding: float  # ||rounding to dtype|| / ||change by the adapter||
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def merge(source: Path | str, out: Path | str, base: str | None = None, to: str = "hf", bits: int | None = None) -> Result:
    """Merge the adapter in `source` (PEFT, mlx-lm, a upo run or checkpoint) into its base model and write that to the new folder `out`.

    `base` is a folder or hub id; by default the model the adapter or run names. Computed in float32, cast once to the base's dtype.
    `to` mlx writes what mlx-lm would, quantised to `bits` (4 or 8) if given; it needs MLX. Raises UpoError; then nothing is written.
    """
    out = Path(out).expanduser()
    if to not in ("hf", "mlx"):
        raise UpoError(f"--to {to}: unknown layout. Known: hf, mlx.")
    if bits is not None and (to != "mlx" or bits not in (4, 8)):
        raise UpoError(f"--bits {bits}: 4 or 8, and with --to mlx only.")
    folder = find(Path(source).expanduser())
    _check_out(out, folder)
    model = _base_folder(folder, Path(source).expanduser(), base)
    _check_out(out, model)
    _check_same_weights(folder, model)
    config, notes = model_config(model)
    _check_base(model, config)
    warnings = _own_files(folder, model)
    weights = Source(model, config)
    if weights.quantised:
        warnings.append(_quantised_warning(bits))
    facts = read_base(model)
    _check_layout(facts, weights, to)
    adapter = _adapter(folder, facts)
    plan = merge_patch.plan(adapter, facts, weights)
    if facts.tied and plan.tied is False:
        notes.append(_untied_note(facts, to))
    if to == "hf" and facts.model_type in (closed := {**CLOSED_TO_MLX, **WRONG_ON_MLX}):
        notes.append(f"model_type {facts.model_type}: for transformers only; {closed[facts.model_type]}.")
    backend: Any = cast(Any, get_backend("mlx")) if to == "mlx" else None
    size = merge_folder.total_size(plan, weights)
    _check_space(out, size * (2 if to == "mlx" else 1))
    with writing(out, "Nothing was written; free some space or name another folder."), adapters.new_folder(out) as temporary:
        merged = temporary / "merged" if backend else temporary
        merged.mkdir(exist_ok=True)
        rounding = merge_folder.write_weights(merged, plan, weights, "mlx" if weights.is_mlx and backend else "pt")
        merge_folder.write_config(merged, config, plan, weights)
        if backend:
            notes += backend.write_model(merged, temporary, bits, GROUP)
            shutil.rmtree(merged)
        merge_folder.copy_rest(model, temporary)
        _check_out(out, model)
    if rounding.share > 0.5:
        warnings.append(
            f"rounding to {merge_folder.dtype_of(plan, weights)} takes {rounding.share:.0%} of the size of the adapter's change: the merged model is a "
            "coarse copy. Keep base and adapter apart, or merge into a float32 base."
        )
    dtype, written = merge_folder.dtype_of(plan, weights), sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return Result(out, to, model, len(adapter.modules), dtype, bits, written, rounding.share, (*notes, *adapter.notes), tuple(warnings))


def _check_out(out: Path, source: Path) -> None:
    if os.path.lexists(out):
        raise RunError(f"--out {out}: exists already. Name another folder; nothing is overwritten.")
    if not out.parent.is_dir():
        raise RunError(f"--out {out}: there is no folder {out.parent}.")
    check_writable(out, "--out")
    if out.resolve().is_relative_to(source.resolve()):
        raise RunError(f"--out {out}: lies inside {source}, which is read from. Name another folder.")


def _base_folder(folder: Path, source: Path, given: str | None) -> Path:
    """The model named, or the one that the run's configuration or the adapter's names."""
    if given is not None:
        return resolve(given)
    name, revision = None, None
    for run in (source, folder.parent, folder.parent.parent):
        if (run / "config.yaml").is_file():
            trained = load_config(run / "config.yaml")
            name, revision = trained.model, trained.revision
            break
    else:
        config = read_json(folder / CONFIG)
        name, revision = config.get("base_model_name_or_path", config.get("model")), config.get("revision")
    if not isinstance(name, str) or not name:
        raise ModelError(f"{folder}: names no base model. Name it: --base MODEL.")
    try:
        return resolve(name, revision if isinstance(revision, str) else None)
    except ModelError as error:
        raise ModelError(f"{folder}: its base model: {error} Or name it: --base MODEL.") from None


def _own_files(folder: Path, model: Path) -> list[str]:
    """Warnings about a tokenizer or chat template beside the adapter that is not the base's: trainers save them there, changed or not."""
    names = ("tokenizer.json", "chat_template.jinja")
    other = [name for name in names if (folder / name).is_file() and not ((model / name).is_file() and (folder / name).read_bytes() == (model / name).read_bytes())]
    return [f"{folder / name}: differs from the base's. The merged model gets the base's; copy this one over it if the adapter was trained with it." for name in other]


def _check_same_weights(folder: Path, model: Path) -> None:
    """Raise ModelError if the manifest of the adapter's run knows the base by another hash."""
    for run in (folder.parent, folder.parent.parent):
        if (run / "manifest.json").is_file():
            identity = read_json(run / "manifest.json").get("identity")
            known = identity.get("model") if isinstance(identity, dict) else None
            if isinstance(known, str) and known != (found := weights_hash(model)):
                raise ModelError(f"{model}: is another model than the one {run} was trained on (weights {found}, the run's {known}). Name that one: --base MODEL.")
            return


def _check_base(model: Path, config: dict[str, Any]) -> None:
    """Raise ModelError for a base that cannot be added to."""
    kind = config.get("model_type")
    if kind in TRANSPOSED:
        raise ModelError(f"model_type {kind}: stores its weights as (in, out), which merging does not support. Merge with peft: model.merge_and_unload().")
    method = "" if isinstance(config.get("quantization"), dict) else quantised_by(config)
    if not method and (model / "hf_quant_config.json").exists():
        method = "ModelOpt"
    if method:
        raise ModelError(
            f"{model}: is quantised with {method}, which cannot be added to. Merge into the original model in bfloat16 or float16: --base MODEL. "
            "Quantise the result anew if you need to."
        )


def _quantised_warning(bits: int | None) -> str:
    again = (
        f" Quantising to {bits} bits again rounds by more than most adapters change: base and adapter kept apart answer better "
        "(mlx_lm.generate --adapter-path)."
        if bits
        else ""
    )
    return (
        "the base is quantised: its weights were de-quantised, which does not bring back what quantising took. The merged model answers like the "
        f"quantised base with the adapter, at the size of an unquantised one. For the original's quality name it: --base MODEL.{again}"
    )


def _check_layout(base: Base, weights: Source, to: str) -> None:
    """Raise ModelError, by name, for a family that cannot be written in this layout."""
    kind = base.model_type
    if to == "hf" and weights.is_mlx and kind not in SAME:
        raise ModelError(f"model_type {kind}: its weights have other names or another arrangement in mlx-lm, whose layout this base has. {_FROM_MLX}")
    if to == "mlx" and kind in WRONG_ON_MLX:
        raise ModelError(f"model_type {kind}: {WRONG_ON_MLX[kind]}. Use --to hf.")
    if to == "mlx" and kind in CLOSED_TO_MLX and not weights.is_mlx:
        raise ModelError(f"model_type {kind}: cannot be written for mlx-lm: {CLOSED_TO_MLX[kind]}. Use --to hf.")


def _adapter(folder: Path, base: Base) -> Adapter:
    """The adapter in its neutral form; a PEFT one on the embeddings or the head of a tied model with each on its own, as PEFT applies it."""
    config = read_json(folder / CONFIG)
    kind = kind_of(folder, config)
    files = read_files(folder, FORMATS[kind].WEIGHTS)
    if kind == "peft" and base.tied and not config.get("ensure_weight_tying"):
        apart: Adapter = FORMATS[kind].read(files, replace(base, tied=False))
        if any(is_head(path) or is_embedding(path) for path in apart.modules):
            return apart
    adapter: Adapter = FORMATS[kind].read(files, base)
    return adapter


def _untied_note(base: Base, to: str) -> str:
    if to == "mlx" and base.model_type in ALWAYS_TIED:
        raise ModelError(
            f"model_type {base.model_type}: the adapter changes embeddings and head in different ways, and mlx-lm always ties them in this family. "
            "Use --to hf, or train with peft's ensure_weight_tying=True."
        )
    only = f" (mlx-lm cannot open this: it always ties them in {base.model_type})" if base.model_type in ALWAYS_TIED else ""
    return f"tie_word_embeddings = false: the adapter changes embeddings and head in different ways, so the head became a weight of its own{only}."


def _check_space(out: Path, size: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if size > free:
        raise RunError(f"--out {out}: the merged model takes {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free. Free some space or name another disk.")
