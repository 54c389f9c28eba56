"""Whether a model may share prompts: its kinds of cache, then a few tokens and a row of the data, scored and differentiated both ways."""

from __future__ import annotations

from typing import Any

import numpy as np

from upo import sharing
from upo.backend import Comm
from upo.config import TrainConfig
from upo.data.forest import Forest
from upo.sharing import Measured
from upo_mlx.device import mx, to_numpy
from upo_mlx.logps import token_logps
from upo_mlx.model import LoRA, Model, has_experts
from upo_mlx.shared import PaddedRows, Rows, SharedPrompts

Array = mx.array


def choose_rows(model: Model, policy: LoRA, train: TrainConfig, dtype: str, comm: Comm) -> tuple[Rows, list[str]]:
    """Shared prompts where the model computes with them what it computes with padded rows, else padded rows and a note that says why.

    `dtype` is that of the base. The same on every rank (collective).
    """
    if train.prefix_sharing == "off":
        return PaddedRows(), []
    rows, reason = _shared(model, policy, train, dtype)
    note = sharing.agreed(comm, _name(model), reason)
    return (rows, []) if note is None else (PaddedRows(), [note])


def unlike_on(model: Model, policy: LoRA, rows: Rows, row: Forest, train: TrainConfig, dtype: str, comm: Comm) -> str | None:
    """A note if a row of the data is not scored alike with its prompt shared. Collective."""
    plain, shared = (lambda f: measure(model, policy, PaddedRows(), f)), (lambda f: measure(model, policy, rows, f, train.gradient_checkpointing))
    reason = sharing.tried(lambda: sharing.unlike(plain, shared, row, dtype))
    return sharing.agreed(comm, _name(model), reason, " on a row of the data")


def _shared(model: Model, policy: LoRA, train: TrainConfig, dtype: str) -> tuple[Rows, str | None]:
    """Rows that pass, and None; or what is wrong. Attention scores of four axes are tried first, then of five."""
    if reason := _unlike_cache(model.net):
        return PaddedRows(), reason
    width = model.head(model.hidden(mx.zeros((1, 1), mx.int32))[0]).shape[-1]  # only its shape is used, so nothing is computed
    reasons = []
    for axes in (4, 5):
        rows = SharedPrompts(axes)

        def check(rows: SharedPrompts = rows) -> str | None:
            plain, shared = (lambda f: measure(model, policy, PaddedRows(), f)), (lambda f: measure(model, policy, rows, f, train.gradient_checkpointing))
            return sharing.why_not(plain, shared, width, dtype, has_experts(model)) or _unmasked(model.net, rows, train.max_length)

        reason = sharing.tried(check)
        if reason is None:
            return rows, None
        reasons.append(reason)
    return PaddedRows(), reasons[0]


def measure(model: Model, policy: LoRA, rows: Rows, forest: Forest, recompute: bool = False) -> Measured:
    """Log-probs and gradient of the policy in this layout."""
    layout = rows.lay(forest)
    signs = mx.array(sharing.signs(len(layout.tgt)))

    def loss(arrays: dict[str, Array]) -> tuple[Array, Array]:
        with model.using(LoRA(arrays, policy.scale)), model.recomputing(recompute):
            logps = token_logps(model.head, rows.hidden(model, layout)[mx.array(layout.src)], mx.array(layout.tgt))
        return mx.sum(logps * signs), logps

    (_, logps), gradient = mx.value_and_grad(loss)(dict(policy.arrays))
    return Measured(to_numpy(logps), np.concatenate([to_numpy(g).ravel() for g in gradient.values()]))


def _name(model: Model) -> str:
    return f"{model.net.__class__.__module__.rpartition('.')[2]} in mlx-lm"


def _unlike_cache(net: Any) -> str | None:
    """What a layer carries from token to token besides keys and values."""
    from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

    caches = make_prompt_cache(net)
    other = sorted({type(cache).__name__ for cache in caches if type(cache) not in (KVCache, RotatingKVCache)})
    if other:
        return f"its layers keep {', '.join(other)}"
    return None if len(caches) == len(net.layers) else f"{len(net.layers)} layers have {len(caches)} caches"


def _unmasked(net: Any, rows: SharedPrompts, tokens: int) -> str | None:
    """Why the mask of the completions may not be right for sequences of up to `tokens`, longer than the probe's."""
    from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

    if not rows.asked:
        return "it makes attention masks of its own"
    windows = {cache.max_size for cache in make_prompt_cache(net) if isinstance(cache, RotatingKVCache)}
    unknown = sorted(window for window in windows - rows.asked if tokens > window)
    return f"it applies a window of {unknown[0]} tokens in a way of its own" if unknown else None
