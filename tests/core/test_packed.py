"""The packed layout against the padded one, and the check that allows it."""

from __future__ import annotations

import numpy as np
import pytest

from upo import sharing
from upo.data.batch import Example
from upo.data.forest import Forest, packed_size, padded
from upo.data.packed import Tree, packed
from upo.sharing import Measured


def distinct(seed: int) -> Forest:
    """Up to five prompts with up to eight completions in any order of prompts; no token occurs twice, so a token names its place."""
    rng = np.random.default_rng(seed)
    prompts, completions = rng.integers(1, 9, rng.integers(1, 6)), rng.integers(1, 7, rng.integers(0, 9))
    cuts = np.cumsum([*prompts, *completions])
    parts = np.split(rng.permutation(cuts[-1]).astype(np.int32), cuts[:-1])
    return Forest(tuple(parts[: len(prompts)]), tuple(parts[len(prompts) :]), rng.integers(0, len(prompts), len(completions)))


@pytest.mark.parametrize("seed", range(40))
def test_the_same_places_are_scored_as_in_the_padded_layout(seed):
    forest = distinct(seed)
    one, other = packed(forest), padded(forest)
    for a, b in zip((one.tgt, one.own), (other.tgt, other.own), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in ((one.src, other.src), (one.value_src, other.value_src)):
        np.testing.assert_array_equal(one.ids.flat[a], other.ids.flat[b])
        assert a.dtype == np.int64
    assert one.ids.shape == one.positions.shape and one.ids.dtype == np.int32


@pytest.mark.parametrize("seed", range(40))
def test_every_token_stands_once_and_sees_its_own_text(seed):
    forest = distinct(seed)
    layout = packed(forest)
    lengths = [(len(p), [len(c) for c, o in zip(forest.completions, forest.owner, strict=True) if o == i]) for i, p in enumerate(forest.prompts)]
    assert layout.ids.size == packed_size(lengths) == len(set(layout.ids[0].tolist()))
    texts = [[*forest.prompts[p], *c] for p, c in zip(forest.owner, forest.completions, strict=True)] + [p.tolist() for p in forest.prompts]
    expected = {text[i]: set(text[: i + 1]) for text in texts for i in range(len(text))}
    at = 0
    for tree in layout.trees:
        here = slice(at, at + tree.tokens)
        ids, positions, branches = layout.ids[0, here], layout.positions[0, here], tree.branches()
        np.testing.assert_array_equal(positions, tree.positions())
        for token, position, branch in zip(ids, positions, branches, strict=True):
            seen = (positions <= position) & ((branches == 0) | (branches == branch))
            assert set(ids[seen].tolist()) == {int(t) for t in expected[token]}
            assert sorted(positions[seen]) == list(range(position + 1)), "one token at each position of its text"
        at += tree.tokens
    assert at == layout.ids.size


def test_order_of_a_tree():
    token = lambda *t: np.array(t, np.int32)  # noqa: E731
    layout = packed(Forest((token(1, 2), token(3)), (token(4), token(5, 6), token(7)), np.array([1, 0, 1])))
    assert layout.ids.tolist() == [[1, 2, 5, 6, 3, 4, 7]]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 0, 1, 1]]
    assert layout.trees == (Tree(2, (2,)), Tree(1, (1, 1)))
    assert layout.src.tolist() == [4, 1, 2, 4] and layout.tgt.tolist() == [4, 5, 6, 7] and layout.own.tolist() == [0, 1, 1, 2]
    assert layout.value_src.tolist() == [1, 4]


# --- The check ------------------------------------------------------------------------------------------------------------------------


def context_sums(forest: Forest, gap: float = 0.0, leak: float = 0.0, turn: float = 0.0) -> Measured:
    """A stand-in for a model: a token's score is the sum of what stands before it; with `leak`, also of the completion before its own."""
    scores, before = [], 0.0
    for p, completion in zip(forest.owner, forest.completions, strict=True):
        text = np.concatenate([forest.prompts[p], completion]).astype(np.float64)
        scores.append(-np.cumsum(text)[len(forest.prompts[p]) - 1 : -1] / 1000 + gap + leak * before)
        before = float(completion.sum() % 7)
    logps = np.concatenate(scores).astype(np.float32)
    return Measured(logps, np.array([1.0, turn]))


@pytest.mark.parametrize("vocab", [96, 384, 49152])
def test_the_check(vocab):
    def why(dtype: str = "float32", mixture: bool = False, **fault: float) -> str | None:
        return sharing.why_not(context_sums, lambda f: context_sums(f, **fault), vocab, dtype, mixture)

    assert why() is None
    assert "differ by 0.01 nats a token" in why(gap=0.01)
    assert why("bfloat16", gap=0.01) is None and "differ by 1 nats" in why("bfloat16", gap=1.0)
    assert "move the log-probs of another" in why("bfloat16", leak=0.01), "16 bits do not hide a leak"
    assert why("bfloat16", mixture=True, leak=0.01) is None
    assert "differ by nan" in why(gap=float("nan"))
    assert "gradients that differ by 0.02 of their norm" in why(turn=0.02)
    assert why("bfloat16", turn=0.02) is None and "gradients that differ by nan" in why(turn=float("nan"))


def test_the_tokens_of_the_check():
    forest = sharing.example(96)
    lengths = sorted(np.bincount(forest.owner).tolist())
    assert lengths == [1, 1, 3] and all((t >= 0).all() and (t < 96).all() for t in (*forest.prompts, *forest.completions))
    assert len(np.unique(np.concatenate([*forest.prompts, *forest.completions]))) > 30


def test_the_row_of_the_check():
    """The smallest of those that share a long prompt, else the longest prompt, the first of equals; two completions of it, and of a long row the beginning."""

    def chosen(rows):
        tokens = lambda n, first=1: np.arange(first, first + n, dtype=np.int32)  # noqa: E731
        made = [Example(f"t:{i}", "pair", tokens(p, i), tuple(map(tokens, cs)), (1,) * len(cs)) for i, (p, *cs) in enumerate(rows)]
        forest = sharing.row_of(made)
        assert forest.owner.tolist() == [0] * len(forest.completions)
        assert all(part[-1] - part[0] == part.size - 1 for part in (*forest.prompts, *forest.completions))
        return int(forest.prompts[0][0]), forest.prompts[0].size, [len(c) for c in forest.completions]

    rows = [(60, 5, 5), (32, 9, 1), (31, 1, 1), (40, 1), (33, 2, 3)]
    assert chosen(rows) == (4, 33, [2, 3])  # 72 slots; row 1 takes 82
    assert chosen(rows[2:4]) == (1, 40, [1])
    assert chosen([(9, 30, 1), (8, 2, 3), (9, 1, 1)]) == (0, 9, [30, 1])
    assert chosen([(4000, 3000, 70, 9)]) == (0, 128, [64, 64])


def test_any_rank_that_cannot_share_is_heard():
    class Two:
        rank, size = 0, 2

        def all_sum(self, array):
            return array + self.other

    comm = Two()
    said = []
    for comm.other in (0, 1):
        said.append([sharing.agreed(comm, "Llama", reason, " here") for reason in (None, "it leaks")])
    own = "train.prefix_sharing: each completion is computed with a prompt of its own: with Llama here, it leaks."
    other = "train.prefix_sharing: each completion is computed with a prompt of its own: another rank has to."
    assert said == [[None, own], [other, own]]
