"""Whether a loaded model may compute a prompt once for all its completions: found out by trying it, on a few tokens and on a row of the data.

Each backend measures with its own model (`selfcheck.py`); what is tried, and what the answers must be like, is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from upo.backend import Comm
from upo.data.batch import Example
from upo.data.forest import Forest, padded_size


@dataclass(frozen=True)
class Measured:
    """What a model says about the completion tokens of a forest."""

    logps: np.ndarray  # [M]
    gradient: np.ndarray  # [P] of the sum of them with `signs`, with respect to the adapter


Measure = Callable[[Forest], Measured]

# Root mean square over tokens, in nats. Two ways of computing the same in bfloat16 were 0.1 apart on SmolLM2-135M, where a token of random
# text costs 15 nats (float32: 1e-5); float16 has three bits more. A prompt unseen or at other positions moves a token by 1 to 10 nats.
LIMITS = {"float32": 1e-3, "bfloat16": 0.4, "float16": 0.05}
# Of the gradient, by its norm. Rounding was 4e-6 in float32 and 0.06 in bfloat16 there; a wrong position, or padding that is seen, 0.6 to 0.8.
SLOPE_LIMITS = {"float32": 1e-2, "bfloat16": 0.5, "float16": 0.5}
LONG = 32  # tokens of a prompt
MOST = (128, 64)  # tokens of a prompt and of a completion
LEAK = 1e-3  # largest, in nats, in any format: equal shapes with other numbers beside them give equal numbers

# What the code of a family may raise where it is given shapes, masks or caches that it does not expect.
ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError, AssertionError)


def example(vocab: int) -> Forest:
    """Three prompts and five completions of few tokens, in mixed order, none of which stands beside the same neighbours twice."""
    sizes = (9, 12, 2, 6, 7, 5, 6, 1)
    tokens = ((np.arange(sum(sizes)) * 7919 + 31) % vocab).astype(np.int32)
    parts = np.split(tokens, np.cumsum(sizes)[:-1])
    return Forest(tuple(parts[:3]), tuple(parts[3:]), np.array([1, 0, 1, 2, 1]))


def row_of(examples: Sequence[Example]) -> Forest:
    """The row of the data to try: the smallest that shares a prompt of at least LONG tokens, more than `example` has; where there is none,
    the one with the longest prompt. Two completions of it, cut to MOST tokens: a longer row costs more and says no more."""

    def slots(e: Example) -> int:
        return padded_size([(len(e.prompt), [len(c) for c in e.completions])])

    sharing = [e for e in examples if len(e.prompt) >= LONG and len(e.completions) > 1]
    row = min(sharing, key=slots) if sharing else max(examples, key=lambda e: len(e.prompt))
    completions = tuple(c[: MOST[1]] for c in row.completions[:2])
    return Forest((row.prompt[: MOST[0]],), completions, np.zeros(len(completions), np.int64))


def signs(tokens: int) -> np.ndarray:
    """[tokens] float32 factors under which completions do not stand for one another."""
    return np.where(np.arange(tokens) % 3 == 0, -1.0, 1.0).astype(np.float32)


def unlike(plain: Measure, shared: Measure, forest: Forest, dtype: str) -> str | None:
    """By how much `shared`, each prompt once, differs from `plain`, a prompt for each completion; None if by rounding (`dtype`'s) only."""
    return _apart(shared(forest), plain(forest), dtype)


def _apart(found: Measured, expected: Measured, dtype: str) -> str | None:
    apart = float(np.sqrt(np.mean((found.logps - expected.logps) ** 2)))
    if not apart <= LIMITS[dtype]:
        return f"a prompt computed once gives log-probs that differ by {apart:.2g} nats a token from those of a prompt for each completion"
    apart = float(np.linalg.norm(found.gradient - expected.gradient) / max(float(np.linalg.norm(expected.gradient)), 1e-30))
    if not apart <= SLOPE_LIMITS[dtype]:
        return f"a prompt computed once gives gradients that differ by {apart:.2g} of their norm from those of a prompt for each completion"
    return None


def why_not(plain: Measure, shared: Measure, vocab: int, dtype: str, mixture: bool = False) -> str | None:
    """The reason why prompts must not be shared, None if they may be, by `example`.

    What one completion says must not touch another's: a change of the tokens beside it leaves all shapes, so it leaves the numbers, in
    16 bits too; where the tokens of a `mixture` of experts are multiplied in groups, up to rounding.
    """
    forest = example(vocab)
    found = shared(forest)
    if reason := _apart(found, plain(forest), dtype):
        return reason
    changed = (1, 2)  # laid out by index or by prompt, a completion that changes stands before one that must not notice
    others = tuple((c[::-1] + 1) % vocab if i in changed else c for i, c in enumerate(forest.completions))
    kept = ~np.isin(np.repeat(np.arange(len(others)), forest.lengths), changed)
    leak = float(np.abs(shared(replace(forest, completions=others)).logps - found.logps)[kept].max())
    if not leak <= (LIMITS[dtype] if mixture else LEAK):
        return f"the tokens of one completion move the log-probs of another by {leak:.2g} nats"
    return None


def tried(check: Callable[[], str | None]) -> str | None:
    """What a check says, or that it ended in an error of the family's code."""
    try:
        return check()
    except ERRORS as error:
        return f"it does not run on shared prompts ({' '.join(str(error).split())[:200] or type(error).__name__})"


def agreed(comm: Comm, name: str, reason: str | None, where: str = "") -> str | None:
    """What to tell the user if this rank has a reason not to share prompts with the model called `name`, or another rank (collective)."""
    if comm.all_sum(np.array([reason is not None], np.float32))[0] == 0:
        return None
    why = "another rank has to" if reason is None else f"with {name}{where}, {reason}"
    return f"train.prefix_sharing: each completion is computed with a prompt of its own: {why}."
