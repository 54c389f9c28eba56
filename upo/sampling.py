"""Choosing the next token, once for both backends: the same logits and seed give the same text."""

from __future__ import annotations

import numpy as np

from upo import random
from upo.backend import Sampling

FEW = 1024


def uniforms(sampling: Sampling, prompt: int) -> np.ndarray:
    """[max_tokens] float64 in [0, 1): a prompt's own stream, named by its place among the prompts, whatever shares its batch."""
    words = random.words(sampling.max_tokens, sampling.seed, "generate", prompt)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def pick(logits: np.ndarray, temperature: float, top_p: float, uniform: np.ndarray) -> np.ndarray:
    """[B] token ids from float32 logits [B, V] and numbers [B] in [0, 1): greedy at temperature 0, else by inverting the distribution.

    top_p keeps the most likely tokens until their mass reaches it, ties with the last one included.
    """
    if temperature == 0:
        return np.argmax(logits, axis=-1)
    weight = np.exp((logits - logits.max(-1, keepdims=True)) / np.float32(temperature))
    if top_p < 1:
        weight[weight < _least(weight, top_p)[:, None]] = 0
    chosen = np.zeros(len(weight), np.int64)
    for row, (kept, u) in enumerate(zip(weight, uniform, strict=True)):
        tokens = np.flatnonzero(kept)
        mass = np.cumsum(kept[tokens], dtype=np.float64)
        chosen[row] = tokens[np.argmax(mass > u * mass[-1])]
    return chosen


def _least(weight: np.ndarray, top_p: float) -> np.ndarray:
    """[B] the weight of the last token that top_p keeps.

    The kept tokens are nearly always among the few largest, so only those are sorted: at a vocabulary of 49k a full sort takes longer
    than the model.
    """
    wanted = top_p * np.sum(weight, axis=-1, dtype=np.float64)
    few = min(FEW, weight.shape[-1])
    falling = -np.sort(-np.partition(weight, -few, axis=-1)[:, -few:], axis=-1)
    if np.any(np.sum(falling, axis=-1, dtype=np.float64) < wanted):
        falling = -np.sort(-weight, axis=-1)
    mass = np.cumsum(falling, axis=-1, dtype=np.float64)
    last = np.argmax(mass >= np.minimum(wanted, mass[:, -1])[:, None], axis=-1)
    return np.take_along_axis(falling, last[:, None], -1)[:, 0]
