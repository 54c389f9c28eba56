"""One optimizer step as a batch, and its micro-batches: a partition within the limit that leaves no rank idle without need."""

from __future__ import annotations

import numpy as np
import pytest

from upo.data.batch import Example, collate, micro_batches
from upo.data.forest import padded
from upo.data.two_phase import two_phase


def tokens(n: int, value: int = 1) -> np.ndarray:
    return np.full(n, value, np.int32)


def example(i: int, prompt: int, *completions: int, kind: str = "group", labels: tuple[int, ...] | None = None, **fields) -> Example:
    made = tuple(tokens(n, 10 * i + j) for j, n in enumerate(completions))
    return Example(f"f:{i}", kind, tokens(prompt, i), made, labels or (0,) * len(made), **fields)


def mixed() -> list[Example]:
    return [
        example(0, 3, 2, 4, kind="pair", labels=(1, -1), reward=(0.5, 0.25), ref_logp=(-1.0, -2.0)),
        example(1, 5, 1, kind="unpaired", labels=(-1,), reward=(1.0,), ref_logp=(-3.0,)),
        example(2, 2, 3, 3, 1, labels=(0, 1, 0), reward=(0.0, 0.1, 0.2), ref_logp=(-4.0, -5.0, -6.0)),
        example(3, 1, 2, 2, kind="pair", labels=(1, -1), reward=(0.3, 0.4), ref_logp=(-7.0, -8.0)),
    ]


def test_collate():
    batch = collate(mixed(), step=9)
    assert batch.origins == ("f:0", "f:1", "f:2", "f:3")
    assert batch.forest.owner.tolist() == [0, 0, 1, 2, 2, 2, 3, 3]
    assert batch.forest.lengths.tolist() == [2, 4, 1, 3, 3, 1, 2, 2]
    assert batch.label.tolist() == [1, -1, -1, 0, 1, 0, 1, -1]
    assert (batch.chosen.tolist(), batch.rejected.tolist()) == ([0, 6], [1, 7])
    assert batch.count == {"pair": 2, "completion": 8, "chosen": 3, "group": 4, "token": 18, "chosen_token": 7}
    assert (batch.step, batch.partners, batch.partner_ref_logp) == (9, None, None)
    assert batch.reward.tolist() == np.float32([0.5, 0.25, 1, 0, 0.1, 0.2, 0.3, 0.4]).tolist()
    assert batch.ref_logp.tolist() == [-1, -2, -3, -4, -5, -6, -7, -8]


def test_partners_are_a_forest_of_the_same_shape():
    rows = [example(0, 3, 2, 4, partners=(tokens(1, 7), tokens(5, 8))), example(1, 2, 1, partners=(tokens(3, 9),))]
    batch = collate(rows)
    assert batch.partners.owner.tolist() == batch.forest.owner.tolist() == [0, 0, 1]
    assert [int(c[0]) for c in batch.partners.completions] == [7, 8, 9]
    part, _ = batch.select([1])
    assert [int(c[0]) for c in part.partners.completions] == [9]


def test_numbers_for_some_rows_only_are_an_error():
    with pytest.raises(ValueError, match="reward is set on some rows only"):
        collate([example(0, 1, 1, reward=(1.0,)), example(1, 1, 1)])


def test_select_keeps_pairs_numbers_and_the_counts_of_the_step():
    batch = collate(mixed())
    part, places = batch.select([3, 1, 0])
    kept = places.completions
    assert kept.tolist() == [0, 1, 2, 6, 7] and places.rows.tolist() == [3, 1, 0]
    assert places.tokens.tolist() == [*range(7), *range(14, 18)]  # completions of 2, 4, 1 tokens; then 2 and 2, after 3 + 3 + 1 others
    assert part.origins == ("f:3", "f:1", "f:0")
    assert part.forest.owner.tolist() == [2, 2, 1, 0, 0]
    assert [int(p[0]) for p in part.forest.prompts] == [3, 1, 0]
    assert (part.chosen.tolist(), part.rejected.tolist()) == ([0, 3], [1, 4])
    assert part.label.tolist() == batch.label[kept].tolist()
    assert part.ref_logp.tolist() == [-1, -2, -3, -7, -8]
    assert part.count == batch.count


def test_scores_spread_values_over_completions():
    batch = collate(mixed())
    scores = batch.scores(np.zeros(8), value=np.array([1.0, 2.0, 3.0, 4.0]))
    assert scores.value.tolist() == [1, 1, 2, 3, 3, 3, 4, 4]
    assert scores.length.tolist() == [2, 4, 1, 3, 3, 1, 2, 2]


def slots_of(forest, layout):
    """Counted from the forest itself."""
    if layout == "padded":
        return padded(forest).ids.size
    if layout == "two_phase":
        return (laid := two_phase(forest)).ids.size + laid.rows.size
    return sum(map(len, forest.prompts)) + sum(map(len, forest.completions))


@pytest.mark.parametrize("seed", range(20))
def test_micro_batches_partition_the_rows_within_the_limit(seed):
    rng = np.random.default_rng(seed)
    rows = [example(i, int(rng.integers(1, 30)), *(int(n) for n in rng.integers(1, 20, int(rng.integers(1, 4))))) for i in range(int(rng.integers(1, 20)))]
    batch = collate(rows)
    for limit in (1, 60, 200, 10_000):
        for layout in ("padded", "packed", "two_phase"):
            parts = micro_batches(batch, limit, layout=layout)
            assert sorted(r for part in parts for r in part) == list(range(len(rows)))
            for part in parts:
                slots = slots_of(batch.select(part)[0].forest, layout)
                assert slots <= limit or len(part) == 1, "only a row that is too long by itself may pass the limit"
    assert len(micro_batches(batch, 10_000)) == 1
    assert [len(p) for p in micro_batches(batch, 1)] == [1] * len(rows)


@pytest.mark.parametrize(("rows", "ranks", "sizes"), [(5, 4, [2, 1, 1, 1]), (8, 3, [3, 3, 2]), (2, 4, [1, 1]), (6, 1, [6]), (6, 2, [3, 3])])
def test_micro_batches_reach_every_rank_that_can_have_one(rows, ranks, sizes):
    parts = micro_batches(collate([example(i, 3, 2) for i in range(rows)]), 10_000, at_least=ranks)
    assert [len(p) for p in parts] == sizes


def test_micro_batches_put_like_lengths_together():
    batch = collate([example(0, 2, 2), example(1, 30, 2), example(2, 3, 2), example(3, 31, 2)])
    assert micro_batches(batch, 70) == [[3, 1], [2, 0]]


def test_a_row_that_would_mostly_pad_begins_a_micro_batch_of_its_own():
    """Joined, prompts of 300 and 100 tokens with a completion of 11 each take 2 * 300 + 2 * 10 slots: 200 more than apart."""
    batch = collate([example(0, 300, 11), example(1, 100, 11), example(2, 99, 11)])
    whole = [[0, 1, 2]]
    assert micro_batches(batch, 10_000, layout="two_phase", device="cpu") == [[0], [1, 2]]
    assert micro_batches(batch, 10_000, layout="two_phase", device="cuda:0") == whole  # a launch costs a GPU more than 400 slots
    assert micro_batches(batch, 10_000, layout="packed", device="cpu") == whole  # nothing is padded
