"""Choosing the next token, once for both backends: the same logits and seed give the same text."""

from __future__ import annotations

import numpy as np

from upo import random
from upo.backend import Sampling


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
    scaled = (logits - logits.max(-1, keepdims=True)) / np.float32(temperature)
    weight = np.exp(scaled)
    if top_p < 1:
        falling = -np.sort(-weight, axis=-1)
        mass = np.cumsum(falling, axis=-1, dtype=np.float64)
        last = np.argmax(mass >= top_p * mass[:, -1:], axis=-1)
        weight = np.where(weight >= np.take_along_axis(falling, last[:, None], -1), weight, 0)
    mass = np.cumsum(weight, axis=-1, dtype=np.float64)
    return np.argmax(mass > uniform[:, None] * mass[:, -1:], axis=-1)
