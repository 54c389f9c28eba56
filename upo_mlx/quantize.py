"""Model folders as mlx-lm writes them, quantised or not."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from upo.errors import ModelError
from upo.models import model_config
from upo.repair import for_mlx
from upo_mlx.family import check_rope, window_notes


def write_model(source: Path, folder: Path, bits: int | None, group: int) -> list[str]:
    """Write the weights and config.json of a checked model folder into another, existing one, in mlx-lm's layout; returns notes.

    `bits` quantises in groups of `group` inputs (mlx-lm's affine mode, with the family's own exceptions); None keeps the dtypes. Weights
    are loaded as they are needed. Raises ModelError for a family that mlx-lm cannot open, or a model without a layer to quantise.
    """
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    config, _ = model_config(source)
    given, notes = for_mlx(config)
    try:
        net, _ = load_model(source, lazy=True, model_config=given)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, FileNotFoundError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise ModelError(f"model_type {config.get('model_type')}: mlx-lm cannot open this model ({reason}). Use --to hf.") from None
    check_rope(source, net, given)
    if isinstance(config.get("max_position_embeddings"), int):
        notes += window_notes(net, given, config["max_position_embeddings"])
    if bits is not None:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the bits per weight
            net, config = quantize_model(net, config, group, bits)
        if not any(hasattr(module, "bits") for _, module in net.named_modules()):
            raise ModelError(f"--bits {bits}: no layer of this model has inputs in whole groups of {group}. Leave --bits out.")
    save_model(folder, net, donate_model=True)
    save_config(config, folder / "config.json")
    return notes
