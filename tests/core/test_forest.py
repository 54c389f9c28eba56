"""The forest and its padded layout, held against a brute-force list of what is scored from where."""

from __future__ import annotations

import numpy as np
import pytest

from upo.data.forest import Forest, Layout, padded, padded_size


def random_forest(seed: int) -> Forest:
    """Up to five prompts, one of them perhaps without completions, completions in any order of prompts."""
    rng = np.random.default_rng(seed)
    prompts = tuple(rng.integers(0, 50, int(rng.integers(1, 9)), dtype=np.int32) for _ in range(int(rng.integers(1, 6))))
    completions = tuple(rng.integers(0, 50, int(rng.integers(1, 7)), dtype=np.int32) for _ in range(int(rng.integers(0, 9))))
    return Forest(prompts, completions, rng.integers(0, len(prompts), len(completions)))


def brute_force(forest: Forest) -> set[tuple[int, int, str, int, int]]:
    """(completion, prompt, segment, offset, target): which logical position predicts which token of which completion."""
    triples = set()
    for i, (completion, p) in enumerate(zip(forest.completions, forest.owner, strict=True)):
        for t, target in enumerate(completion):
            segment, offset = ("prompt", len(forest.prompts[p]) - 1) if t == 0 else ("completion", t - 1)
            triples.add((i, int(p), segment, offset, int(target)))
    return triples


def logical(forest: Forest, layout: Layout) -> set[tuple[int, int, str, int, int]]:
    """The layout's indices mapped back; row b of the padded layout holds completion b."""
    width = layout.ids.shape[1]
    triples = set()
    for src, tgt, own in zip(layout.src, layout.tgt, layout.own, strict=True):
        row, column = divmod(int(src), width)
        assert row == own
        p = int(forest.owner[own])
        n = len(forest.prompts[p])
        segment, offset = ("prompt", column) if column < n else ("completion", column - n)
        triples.add((int(own), p, segment, offset, int(tgt)))
    return triples


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("seed", range(40))
def test_padded_scores_the_same_places_as_brute_force(seed, multiple):
    forest = random_forest(seed)
    layout = padded(forest, multiple, pad_id=99)
    assert logical(forest, layout) == brute_force(forest)
    assert len(layout.src) == forest.lengths.sum(), "no place twice"
    assert layout.ids.shape[1] % multiple == 0

    ids = layout.ids.reshape(-1)
    for i, (completion, p) in enumerate(zip(forest.completions, forest.owner, strict=True)):
        whole = [*forest.prompts[p], *completion]
        assert layout.ids[i].tolist() == whole + [99] * (layout.ids.shape[1] - len(whole))
    within = layout.own[1:] == layout.own[:-1]
    assert (ids[layout.src[1:]][within] == layout.tgt[:-1][within]).all(), "each token is scored from the one before it"
    assert (np.diff(layout.own) >= 0).all() and (np.diff(layout.src)[within] == 1).all(), "sorted by completion, then by position"

    for p, at in enumerate(layout.value_src):
        row, column = divmod(int(at), layout.ids.shape[1])
        assert column == len(forest.prompts[p]) - 1
        assert layout.ids[row, : column + 1].tolist() == forest.prompts[p].tolist()


@pytest.mark.parametrize("seed", range(10))
def test_padded_size_needs_no_layout(seed):
    forest = random_forest(seed)
    lengths = [(len(p), [len(c) for c, o in zip(forest.completions, forest.owner, strict=True) if o == i]) for i, p in enumerate(forest.prompts)]
    for multiple in (1, 16):
        assert padded_size(lengths, multiple) == padded(forest, multiple).ids.size


def test_types_of_a_layout():
    layout = padded(random_forest(3))
    assert layout.ids.dtype == np.int32
    assert {a.dtype for a in (layout.src, layout.tgt, layout.own, layout.value_src)} == {np.dtype(np.int64)}


def test_select_reorders_prompts_and_keeps_the_order_of_completions():
    forest = Forest(
        tuple(np.array([p], np.int32) for p in range(3)), tuple(np.array([10 + c], np.int32) for c in range(5)), np.array([2, 0, 1, 2, 0])
    )
    part, kept = forest.select([2, 0])
    assert kept.tolist() == [0, 1, 3, 4]
    assert [int(p[0]) for p in part.prompts] == [2, 0]
    assert part.owner.tolist() == [0, 1, 0, 1]
    assert [int(c[0]) for c in part.completions] == [10, 11, 13, 14]


def test_forests_that_cannot_be_scored():
    one, none = np.array([1], np.int32), np.zeros(0, np.int32)
    with pytest.raises(ValueError, match="2 completions with 1 owners"):
        Forest((one,), (one, one), np.array([0]))
    for prompt, completion in ((none, one), (one, none)):
        with pytest.raises(ValueError, match="without tokens"):
            Forest((prompt,), (completion,), np.array([0]))
