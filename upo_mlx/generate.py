"""Batched sampling with a key/value cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from upo.backend import Sampling
from upo.data.forest import Tokens
from upo.sampling import pick, uniforms
from upo_mlx.device import mx, to_numpy
from upo_mlx.model import Model


def generate(model: Model, prompts: Sequence[Tokens], sampling: Sampling, stops: Sequence[int]) -> list[Tokens]:
    """Continuations in the order of the prompts, each without the stop token that ended it.

    Prompts of like length share a batch. Each prompt has a stream of random numbers of its own, named by its place in `prompts`, so a
    text does not depend on which others share its batch (but for rounding).
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    paddable = all(type(c).__name__ == "KVCache" for c in _plain_cache(model))
    done: dict[int, Tokens] = {}
    batch: list[int] = []
    for place, i in enumerate(order):
        batch.append(i)
        last = place + 1 == len(order)
        if last or len(batch) == sampling.batch_size or not (paddable or len(prompts[order[place + 1]]) == len(prompts[i])):
            uniform = np.stack([uniforms(sampling, j) for j in batch])
            done |= zip(batch, _generate(model, [prompts[j] for j in batch], sampling, stops, uniform), strict=True)
            batch = []
    return [done[i] for i in range(len(prompts))]


def _generate(model: Model, prompts: Sequence[Tokens], sampling: Sampling, stops: Sequence[int], uniform: np.ndarray) -> list[Tokens]:
    width = max(map(len, prompts))
    padding = [width - len(p) for p in prompts]
    cache = _plain_cache(model) if not any(padding) else _padded_cache(model, padding)
    ids = np.stack([np.concatenate([np.zeros(n, np.int32), p]) for n, p in zip(padding, prompts, strict=True)])
    output: list[list[int]] = [[] for _ in prompts]
    running = np.ones(len(prompts), bool)
    for step in range(sampling.max_tokens):
        hidden = model.hidden(mx.array(ids.astype(np.int32)), cache)[:, -1]
        chosen = pick(to_numpy(model.head(hidden)), sampling.temperature, sampling.top_p, uniform[:, step])
        running &= ~np.isin(chosen, np.asarray(stops))
        if not running.any():
            break
        for i in np.flatnonzero(running):
            output[i].append(int(chosen[i]))
        ids = chosen[:, None]
    return [np.array(tokens, np.int32) for tokens in output]


def _plain_cache(model: Model) -> list[Any]:
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(model.net)


def _padded_cache(model: Model, padding: list[int]) -> list[Any]:
    """Masks the padding on the left of each row and counts positions from its end."""
    from mlx_lm.models.cache import BatchKVCache

    return [BatchKVCache(padding) for _ in model.layer_paths]
