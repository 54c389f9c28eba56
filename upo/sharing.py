"""Whether a loaded model may compute a prompt once for all its completions: found out by trying it on a few tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from upo.data.forest import Forest

Score = Callable[[Forest], np.ndarray]  # a forest -> [M] log-probs of its completion tokens

# Root mean square over tokens, in nats. Two ways of computing the same in bfloat16 were 0.1 apart on SmolLM2-135M, where a token of random
# text costs 15 nats (float32: 5e-6); float16 has three bits more. A prompt unseen or at other positions moves a token by 1 to 10 nats.
LIMITS = {"float32": 1e-3, "bfloat16": 0.4, "float16": 0.05}
LEAK = 1e-3  # largest, in nats, in any format: equal shapes with other numbers beside them give equal numbers


def example(vocab: int) -> Forest:
    """Two prompts with one and three completions, of few tokens, none of which stands beside the same neighbours twice."""
    sizes, places = (9, 12, 6, 7, 5, 6), np.arange(45)
    tokens = ((places * 7919 + 31) % vocab).astype(np.int32)
    parts = np.split(tokens, np.cumsum(sizes)[:-1])
    return Forest((parts[0], parts[1]), tuple(parts[2:]), np.array([0, 1, 1, 1]))


def why_not(plain: Score, shared: Score, vocab: int, dtype: str, mixture: bool = False) -> str | None:
    """The reason why prompts must not be shared, None if they may be.

    `plain` computes each completion with a prompt of its own, `shared` each prompt once. Their token log-probs may differ by rounding
    (`LIMITS`, nats). What one completion says must not touch another's: a change of the tokens beside it leaves all shapes, so it leaves
    the numbers, in 16 bits too; where the tokens of a `mixture` of experts are multiplied in groups, up to rounding.
    """
    forest, limit = example(vocab), LIMITS[dtype]
    once = shared(forest)
    apart = float(np.sqrt(np.mean((once - plain(forest)) ** 2)))
    if not apart <= limit:
        return f"a prompt computed once gives log-probs that differ by {apart:.2g} nats a token from those of a prompt for each completion"
    # Completions 0 and 2 change; 1, which follows 0 after another prompt, and 3, which follows 2, must not notice.
    changed = tuple((c[::-1] + 1) % vocab if i in (0, 2) else c for i, c in enumerate(forest.completions))
    kept = np.isin(np.repeat(np.arange(4), forest.lengths), (1, 3))
    leak = float(np.abs(shared(replace(forest, completions=changed)) - once)[kept].max())
    if not leak <= (limit if mixture else LEAK):
        return f"the tokens of one completion move the log-probs of another by {leak:.2g} nats"
    return None
