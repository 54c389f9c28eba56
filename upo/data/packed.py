"""The packed, prefix-shared layout of a forest: one row of tokens, each prompt once, its completions after it, no padding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from upo.data.forest import Forest, Layout


@dataclass(frozen=True)
class Tree:
    """A prompt with its completions, side by side in the row: their numbers of tokens."""

    prompt: int
    completions: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.prompt + sum(self.completions)

    def positions(self) -> np.ndarray:
        """[tokens] the position of each token in its own text: every completion goes on from the prompt."""
        return np.concatenate([np.arange(self.prompt), *(self.prompt + np.arange(n) for n in self.completions)])

    def branches(self) -> np.ndarray:
        """[tokens] 0 for the prompt, i for its i-th completion. A token sees earlier positions of branch 0 and of its own."""
        return np.repeat(np.arange(1 + len(self.completions)), (self.prompt, *self.completions))


@dataclass(frozen=True)
class Packed(Layout):
    """A layout of one row [1, T]. A causal mask over the row would be wrong: `trees`, in order, say which tokens belong together."""

    positions: np.ndarray  # [1, T] int64
    trees: tuple[Tree, ...]


def packed(forest: Forest) -> Packed:
    """Prompt 0, its completions in the forest's order, prompt 1, ...; T is the number of different tokens to compute."""
    ids: list[np.ndarray] = []
    trees: list[Tree] = []
    scored: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # completion -> src, tgt
    value_src = np.zeros(len(forest.prompts), np.int64)
    at = 0
    for p, prompt in enumerate(forest.prompts):
        mine = np.flatnonzero(forest.owner == p)
        last = at + len(prompt) - 1
        value_src[p] = last
        ids.append(prompt)
        at += len(prompt)
        for i in mine:
            completion = forest.completions[i]
            scored[int(i)] = np.concatenate([[last], np.arange(at, at + len(completion) - 1)]), completion
            ids.append(completion)
            at += len(completion)
        trees.append(Tree(len(prompt), tuple(len(forest.completions[i]) for i in mine)))
    n = len(forest.completions)
    empty = [np.zeros(0, np.int64)]
    return Packed(
        ids=np.concatenate(ids).astype(np.int32)[None],
        src=np.concatenate([scored[i][0] for i in range(n)] or empty).astype(np.int64),
        tgt=np.concatenate([scored[i][1] for i in range(n)] or empty).astype(np.int64),
        own=np.repeat(np.arange(n, dtype=np.int64), forest.lengths),
        value_src=value_src,
        positions=np.concatenate([tree.positions() for tree in trees])[None].astype(np.int64),
        trees=tuple(trees),
    )
