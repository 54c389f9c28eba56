"""Batched sampling with a key/value cache: a prompt asked for several answers is computed once, and answers that have ended are dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from upo.backend import Sampling
from upo.data.forest import Tokens
from upo.sampling import distinct, pick, uniforms
from upo_mlx.device import mx, to_numpy
from upo_mlx.model import Model


def generate(model: Model, prompts: Sequence[Tokens], sampling: Sampling, stops: Sequence[int]) -> list[Tokens]:
    """Continuations in the order of the prompts, each without the stop token that ended it.

    Prompts of like length share a batch, equal ones side by side. Each prompt has a stream of random numbers of its own, named by its place in `prompts`, so a
    text does not depend on which others share its batch (but for rounding).
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i].tobytes()))
    plain = all(type(c).__name__ == "KVCache" for c in _plain_cache(model))  # others cannot be padded, nor rows of them taken
    done: dict[int, Tokens] = {}
    batch: list[int] = []
    for place, i in enumerate(order):
        batch.append(i)
        last = place + 1 == len(order)
        if last or len(batch) == sampling.batch_size or not (plain or len(prompts[order[place + 1]]) == len(prompts[i])):
            uniform = np.stack([uniforms(sampling, j) for j in batch])
            done |= zip(batch, _generate(model, [prompts[j] for j in batch], sampling, stops, uniform, plain), strict=True)
            batch = []
    return [done[i] for i in range(len(prompts))]


def _generate(model: Model, prompts: Sequence[Tokens], sampling: Sampling, stops: Sequence[int], uniform: np.ndarray, plain: bool) -> list[Tokens]:
    asked, which = distinct(prompts) if plain else (prompts, np.arange(len(prompts)))
    width = max(map(len, asked))
    padding = [width - len(p) for p in asked]
    cache = _padded_cache(model, padding) if any(padding) else _plain_cache(model)
    ids = np.stack([np.concatenate([np.zeros(n, np.int32), p]) for n, p in zip(padding, asked, strict=True)])
    logits = _logits(model, ids, cache)[which]
    if len(asked) < len(prompts):
        _take(cache, which)
    output: list[list[int]] = [[] for _ in prompts]
    rows, running = np.arange(len(prompts)), np.ones(len(prompts), bool)  # whose answer each row of the cache is, and whether it goes on
    for step in range(sampling.max_tokens):
        chosen = pick(logits, sampling.temperature, sampling.top_p, uniform[rows, step])
        running &= ~np.isin(chosen, np.asarray(stops))
        for row in np.flatnonzero(running):
            output[rows[row]].append(int(chosen[row]))
        if not running.any() or step + 1 == sampling.max_tokens:
            break
        if plain and 2 * np.count_nonzero(running) <= len(rows):  # to take rows copies the cache, so it is done once for many
            _take(cache, np.flatnonzero(running))
            chosen, rows, running = chosen[running], rows[running], running[running]
        logits = _logits(model, chosen[:, None], cache)
    return [np.array(tokens, np.int32) for tokens in output]


def _logits(model: Model, ids: np.ndarray, cache: list[Any]) -> np.ndarray:
    """[B, V] float32 at the last of the tokens [B, T], which are added to the cache."""
    return to_numpy(model.head(model.hidden(mx.array(ids.astype(np.int32)), cache)[:, -1]))


def _plain_cache(model: Model) -> list[Any]:
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(model.net)


def _padded_cache(model: Model, padding: list[int]) -> list[Any]:
    """Masks the padding on the left of each row and counts positions from its end."""
    from mlx_lm.models.cache import BatchKVCache

    return [BatchKVCache(padding) for _ in model.layer_paths]


def _take(cache: list[Any], rows: np.ndarray) -> None:
    """These rows of a filled cache, in this order, a row as often as it is named."""
    index = mx.array(rows)
    for layer in cache:
        if hasattr(layer, "filter"):
            layer.filter(index)
        else:
            layer.keys, layer.values = layer.keys[index], layer.values[index]
