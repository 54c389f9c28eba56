"""Choosing the next token, once for both backends: the same logits and seed give the same text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from upo import random
from upo.backend import Sampling
from upo.data.forest import Tokens

LIKELY = 1e-4  # of the most likely token


def uniforms(sampling: Sampling, prompt: int) -> np.ndarray:
    """[max_tokens] float64 in [0, 1): a prompt's own stream, named by its place among all prompts, whatever shares its batch or its rank."""
    words = random.words(sampling.max_tokens, sampling.seed, "generate", sampling.place + sampling.stride * prompt)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def distinct(prompts: Sequence[Tokens]) -> tuple[list[Tokens], np.ndarray]:
    """The prompts without repetition, in the order of their first, and [B] int64, which of them each one is: asked for several answers,
    a prompt is computed once."""
    found: dict[bytes, int] = {}
    which = np.array([found.setdefault(np.asarray(p, np.int32).tobytes(), len(found)) for p in prompts], np.int64)
    return [prompts[i] for i in np.unique(which, return_index=True)[1]], which


def pick(logits: np.ndarray, temperature: float, top_p: float, uniform: np.ndarray) -> np.ndarray:
    """[B] token ids from float32 logits [B, V] and numbers [B] in [0, 1): greedy at temperature 0, else by inverting the distribution.

    top_p keeps the most likely tokens until their mass reaches it, ties with the last one included.
    """
    if temperature == 0:
        return np.argmax(logits, axis=-1)
    weights = np.exp((logits - logits.max(-1, keepdims=True)) / np.float32(temperature))
    return np.array([_draw(weight, top_p, u) for weight, u in zip(weights, uniform, strict=True)], np.int64)


def _draw(weight: np.ndarray, top_p: float, uniform: float) -> int:
    """A token of one distribution [V], given by weights of which the largest is 1."""
    tokens = _nucleus(weight, top_p) if top_p < 1 else np.flatnonzero(weight)
    mass = np.cumsum(weight[tokens], dtype=np.float64)
    return int(tokens[np.argmax(mass > uniform * mass[-1])])


def _nucleus(weight: np.ndarray, top_p: float) -> np.ndarray:
    """The tokens that top_p keeps. They are nearly always among the likely ones, so only those are sorted: at a vocabulary of 49k a full
    sort takes longer than a small model does."""
    wanted = top_p * np.sum(weight, dtype=np.float64)
    likely = weight[weight > LIKELY]
    falling = np.sort(likely if np.sum(likely, dtype=np.float64) >= wanted else weight)[::-1]
    mass = np.cumsum(falling, dtype=np.float64)
    return np.flatnonzero(weight >= falling[np.argmax(mass >= min(wanted, mass[-1]))])
