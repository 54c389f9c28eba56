"""The two-phase layout scores the same places as the padded one and as a brute-force list."""

from __future__ import annotations

import numpy as np
import pytest

from upo.data.forest import Forest, padded, two_phase_size
from upo.data.two_phase import TwoPhase, two_phase

Place = tuple[int, str, int, int]  # completion, segment, offset in it, target


def random_forest(seed: int, completions: int | None = None) -> Forest:
    """Up to five prompts, one of them perhaps without completions, completions in any order of prompts."""
    rng = np.random.default_rng(seed)
    prompts = tuple(rng.integers(0, 50, int(rng.integers(1, 9)), dtype=np.int32) for _ in range(int(rng.integers(1, 6))))
    count = int(rng.integers(0, 9)) if completions is None else completions
    return Forest(prompts, tuple(rng.integers(0, 50, int(rng.integers(1, 7)), dtype=np.int32) for _ in range(count)), rng.integers(0, len(prompts), count))


def brute_force(forest: Forest) -> set[Place]:
    """Which logical position predicts which token of which completion."""
    return {
        (i, *(("prompt", len(forest.prompts[p]) - 1) if t == 0 else ("completion", t - 1)), int(target))
        for i, (completion, p) in enumerate(zip(forest.completions, forest.owner, strict=True))
        for t, target in enumerate(completion)
    }


def logical(forest: Forest, layout: TwoPhase) -> set[Place]:
    """The layout's indices mapped back, each checked to lie in the prompt or the row of its completion."""
    places = set()
    for src, tgt, own in zip(layout.src, layout.tgt, layout.own, strict=True):
        if src < layout.ids.size:
            row, offset = divmod(int(src), layout.ids.shape[1])
            assert row == forest.owner[own]
            places.add((int(own), "prompt", offset, int(tgt)))
        else:
            row, offset = divmod(int(src) - layout.ids.size, layout.rows.shape[1])
            assert row == own
            places.add((int(own), "completion", offset, int(tgt)))
    return places


def logical_padded(forest: Forest) -> set[Place]:
    layout = padded(forest)
    places = set()
    for src, tgt, own in zip(layout.src, layout.tgt, layout.own, strict=True):
        n, column = len(forest.prompts[forest.owner[own]]), int(src) % layout.ids.shape[1]
        places.add((int(own), *(("prompt", column) if column < n else ("completion", column - n)), int(tgt)))
    return places


@pytest.mark.parametrize("seed", range(40))
def test_the_same_places_as_brute_force_and_padded(seed):
    forest = random_forest(seed)
    layout = two_phase(forest)
    assert logical(forest, layout) == brute_force(forest) == logical_padded(forest)
    assert len(layout.src) == forest.lengths.sum(), "no place twice"
    other = padded(forest)
    np.testing.assert_array_equal(layout.own, other.own)  # scores come in one order in every layout
    np.testing.assert_array_equal(layout.tgt, other.tgt)


@pytest.mark.parametrize("seed", range(20))
def test_rows_offsets_and_value_places(seed):
    forest = random_forest(seed)
    layout = two_phase(forest, pad_id=99)
    for p, prompt in enumerate(forest.prompts):
        assert layout.ids[p].tolist() == prompt.tolist() + [99] * (layout.ids.shape[1] - len(prompt))
        assert layout.value_src[p] == p * layout.ids.shape[1] + len(prompt) - 1
    assert layout.ids.shape[1] == max(map(len, forest.prompts))
    for i, completion in enumerate(forest.completions):
        assert layout.rows[i].tolist() == completion[:-1].tolist() + [99] * (layout.rows.shape[1] - len(completion) + 1)
        prompt = forest.prompts[forest.owner[i]]
        assert layout.offset[i] == len(prompt)
        slots = np.concatenate([layout.ids.ravel(), layout.rows.ravel()])
        alone = [*prompt.tolist(), *completion[:-1].tolist()]
        assert slots[layout.keys[i]].tolist()[: len(alone)] == alone and not layout.keys[i, len(alone) :].any()
        assert layout.src[layout.own == i].tolist() == layout.keys[i, len(prompt) - 1 : len(alone)].tolist()
    assert {a.dtype for a in (layout.src, layout.tgt, layout.own, layout.value_src)} == {np.dtype(np.int64)}
    assert {a.dtype for a in (layout.ids, layout.rows, layout.offset, layout.keys)} == {np.dtype(np.int32)}


@pytest.mark.parametrize("seed", range(20))
def test_size_needs_no_layout(seed):
    forest = random_forest(seed)
    lengths = [(len(p), [len(c) for c, o in zip(forest.completions, forest.owner, strict=True) if o == i]) for i, p in enumerate(forest.prompts)]
    layout = two_phase(forest)
    assert two_phase_size(lengths) == layout.ids.size + layout.rows.size


def test_without_completions_or_with_single_tokens_there_is_no_second_phase():
    alone = two_phase(random_forest(1, completions=0))
    assert alone.rows.size == 0 and len(alone.src) == 0 and len(alone.value_src) == len(alone.ids)
    single = Forest((np.array([4, 5], np.int32), np.array([6], np.int32)), tuple(np.array([t], np.int32) for t in (7, 8, 9)), np.array([1, 0, 1]))
    layout = two_phase(single)
    assert layout.rows.shape == (3, 0)
    assert layout.src.tolist() == [2, 1, 2] and layout.tgt.tolist() == [7, 8, 9]
