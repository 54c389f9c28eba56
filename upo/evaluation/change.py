"""How much a number changed over a set of prompts, and how sure one can be: a paired difference with its bootstrap interval."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from upo.random import words as random_words


@dataclass(frozen=True)
class Change:
    """A mean over prompts with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def change(before: np.ndarray, after: np.ndarray, draws: int = 10_000, seed: int = 0) -> Change:
    """Mean of after - before, [prompts, samples] or [prompts], with a 95 % percentile interval.

    Prompts are drawn with replacement, each with all its answers, since answers to one prompt are not independent.
    """
    difference = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    return interval(difference.reshape(len(difference), -1).mean(axis=1), draws, seed)


def interval(per_prompt: np.ndarray, draws: int = 10_000, seed: int = 0) -> Change:
    """Mean of one number per prompt, with the 95 % percentile interval of the mean."""
    n = len(per_prompt)
    drawn = (random_words(draws * n, seed, "bootstrap") % np.uint64(n)).astype(np.int64).reshape(draws, n)
    low, high = np.quantile(per_prompt[drawn].mean(axis=1), [0.025, 0.975])
    return Change(float(per_prompt.mean()), float(low), float(high))
