"""Whether a model may share prompts: its kinds of cache, and a few tokens scored and differentiated in both layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from upo import random
from upo.backend import Comm
from upo.config import TrainConfig
from upo.data.forest import Forest
from upo_mlx.device import mx, to_numpy
from upo_mlx.logps import token_logps
from upo_mlx.model import LoRA, Model
from upo_mlx.shared import PaddedRows, Rows, SharedPrompts

Array = mx.array
PROMPTS, COMPLETIONS, OWNER = (5, 2, 7), (3, 4, 1, 2, 5), (1, 0, 2, 0, 2)  # tokens; of several lengths, so that padding and positions matter
ERRORS = (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError, AssertionError)

# Largest mean difference of a token's log-prob in nats, and of the gradient by its norm. On SmolLM2-135M round-off in float32 was 1e-5 and
# 4e-6, and in bfloat16 up to 0.1 (in torch) between ways of computing the same; a wrong position, or padding that is seen, gave 0.5 to 0.9 and 0.6 to 0.8.
EXACT = (1e-3, 1e-2)
SIXTEEN_BITS = (0.25, 0.5)


@dataclass(frozen=True)
class Probe:
    """What one layout says about the probe's tokens."""

    logps: np.ndarray  # [M]
    gradient: np.ndarray  # of a sum of them with signs, with respect to the adapter
    exact: bool  # computed in float32


def choose_rows(model: Model, policy: LoRA, train: TrainConfig, comm: Comm) -> tuple[Rows, list[str]]:
    """Shared prompts where the model computes with them what it computes with padded rows, else padded rows and a note that says why.

    The same on every rank (collective).
    """
    if train.prefix_sharing == "off":
        return PaddedRows(), []
    rows, reason = _shared(model, policy, train)
    if comm.all_sum(np.array([rows is None], np.float32))[0] == 0 and rows is not None:
        return rows, []
    kind = model.net.__class__.__module__.rpartition(".")[2]
    return PaddedRows(), [
        f"train.prefix_sharing: each completion is computed with a prompt of its own, as {kind} in mlx-lm cannot share it: {reason or 'says another rank'}."
    ]


def _shared(model: Model, policy: LoRA, train: TrainConfig) -> tuple[SharedPrompts | None, str]:
    """Rows that pass, or None and what is wrong. Attention scores of four axes are tried first, then of five."""
    reason = _unlike_cache(model.net)
    if reason:
        return None, reason
    plain = probe(model, policy, PaddedRows(), recompute=False)
    reasons = []
    for axes in (4, 5):
        rows = SharedPrompts(axes)
        try:
            found = probe(model, policy, rows, train.gradient_checkpointing)
        except ERRORS as error:
            reasons.append(f"self-check: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}")
            continue
        reason = unlike(plain, found) or _unmasked(model.net, rows, train.max_length)
        if not reason:
            return rows, ""
        reasons.append(reason)
    return None, reasons[0]


def probe(model: Model, policy: LoRA, rows: Rows, recompute: bool) -> Probe:
    """Random tokens in this layout."""
    width = model.head(model.hidden(mx.zeros((1, 1), mx.int32))[0]).shape[-1]  # only its shape is used, so nothing is computed
    tokens = (random.words(sum(PROMPTS) + sum(COMPLETIONS), 0, "self-check") % np.uint64(width)).astype(np.int32)
    parts = np.split(tokens, np.cumsum((*PROMPTS, *COMPLETIONS))[:-1])
    layout = rows.lay(Forest(tuple(parts[: len(PROMPTS)]), tuple(parts[len(PROMPTS) :]), np.array(OWNER)))
    signs = mx.array(np.where(np.arange(len(layout.tgt)) % 3 == 0, -1.0, 1.0).astype(np.float32))
    exact = []

    def loss(arrays: dict[str, Array]) -> tuple[Array, Array]:
        with model.using(LoRA(arrays, policy.scale)), model.recomputing(recompute):
            hidden = rows.hidden(model, layout)
            exact.append(hidden.dtype == mx.float32)
            logps = token_logps(model.head, hidden[mx.array(layout.src)], mx.array(layout.tgt))
        return mx.sum(logps * signs), logps

    (_, logps), gradient = mx.value_and_grad(loss)(dict(policy.arrays))
    return Probe(to_numpy(logps), np.concatenate([to_numpy(g).ravel() for g in gradient.values()]), exact[0])


def unlike(plain: Probe, shared: Probe) -> str | None:
    """What differs between two layouts by more than rounding."""
    most_logp, most_gradient = EXACT if plain.exact else SIXTEEN_BITS
    logp = float(np.abs(plain.logps - shared.logps).mean())
    gradient = float(np.linalg.norm(plain.gradient - shared.gradient) / max(float(np.linalg.norm(plain.gradient)), 1e-30))
    if not logp <= most_logp:
        return f"self-check: log-probs differ by {logp:.2g} nats per token"
    return None if gradient <= most_gradient else f"self-check: gradients differ by {gradient:.2g} of their norm"


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
