"""How sure a difference between two methods is, over prompts and over seeds."""

from __future__ import annotations

import numpy as np

from upo.evaluation.change import Change
from upo.random import words

DRAWS = 10_000


def difference(ours: np.ndarray, theirs: np.ndarray) -> Change:
    """Mean of ours - theirs, [seeds, prompts], with a 95 % percentile interval.

    Every seed answers every prompt, so seeds and prompts are drawn with replacement independently of one another, and a drawn prompt counts
    for all drawn seeds, on both sides. A little wide rather than narrow: the noise of single answers is counted with both (Owen 2007, "The
    pigeonhole bootstrap"). With one seed only the prompts are drawn: what another seed would give is then not in the interval.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"not the same seeds and prompts: {ours.shape} and {theirs.shape}")
    apart = ours - theirs
    seeds, prompts = (_times(n, purpose) for n, purpose in zip(apart.shape, ("seeds", "prompts"), strict=True))
    means = np.einsum("ds,sp,dp->d", seeds, apart, prompts, optimize=True)
    low, high = np.quantile(means, [0.025, 0.975])
    return Change(float(apart.mean()), float(low), float(high))


def _times(n: int, purpose: str) -> np.ndarray:
    """[DRAWS, n] how often each of n is drawn when n are, as a share of n."""
    drawn = (words(DRAWS * n, 0, "miniature", purpose) % np.uint64(n)).astype(np.int64).reshape(DRAWS, n)
    flat = drawn + n * np.arange(DRAWS)[:, None]
    return np.bincount(flat.ravel(), minlength=DRAWS * n).reshape(DRAWS, n) / n
