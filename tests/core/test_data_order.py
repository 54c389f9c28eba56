"""Order and partners: complete, fixed for good by the seed, and never the same prompt."""

from __future__ import annotations

import numpy as np
import pytest

from upo.config import TrainConfig
from upo.data.batch import Example
from upo.data.order import epoch_order, step_rows, steps_per_epoch, total_steps
from upo.data.partners import assign_partners
from upo.data.split import prompt_key
from upo.errors import DataError


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def example(i: int, prompt: tuple[int, ...], *completions: tuple[int, ...]) -> Example:
    return Example(f"f:{i}", "group", tokens(*prompt), tuple(tokens(*c) for c in completions), (0,) * len(completions))


# --- Order --------------------------------------------------------------------------------------------------------------------------


def test_order_is_pinned():
    """Literal values: a run that is resumed with another NumPy, backend or platform must go on with the same rows."""
    assert epoch_order(8, 0, 0).tolist() == [4, 6, 2, 7, 0, 5, 1, 3]
    assert epoch_order(8, 0, 1).tolist() == [2, 3, 1, 4, 7, 6, 0, 5]
    assert epoch_order(8, 1, 0).tolist() == [3, 7, 1, 2, 5, 6, 0, 4]


def test_steps_cover_each_epoch_once_and_never_straddle_two():
    n, batch = 10, 4
    assert steps_per_epoch(n, batch) == 3
    for epoch in range(3):
        steps = [step_rows(n, batch, 7, 3 * epoch + i) for i in range(3)]
        assert [len(s) for s in steps] == [4, 4, 2], "the last short step is kept"
        assert np.concatenate(steps).tolist() == epoch_order(n, 7, epoch).tolist()
        assert sorted(np.concatenate(steps).tolist()) == list(range(n))


def test_step_of_more_rows_than_there_are_takes_them_all():
    assert steps_per_epoch(3, 8) == 1
    assert sorted(step_rows(3, 8, 0, 5).tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("epochs", "n", "batch", "total"),
    [(1.0, 10, 4, 3), (2.0, 10, 4, 6), (0.5, 10, 4, 2), (2.5, 16, 4, 10), (0.07, 100, 1, 7), (1.1, 100, 10, 11), (0.1, 10, 1, 1), (1.001, 10, 1, 11), (0.01, 5, 8, 1)],
)
def test_total_steps_of_epochs(epochs, n, batch, total):
    assert total_steps(TrainConfig(epochs=epochs, batch_size=batch), n) == total


def test_total_steps_given():
    assert total_steps(TrainConfig(epochs=3, steps=5, batch_size=4), 100) == 5


# --- Partners -----------------------------------------------------------------------------------------------------------------------


def check_partners(examples: list[Example], done: list[Example], max_length: int = 100) -> None:
    owner = {tuple(c.tolist()): prompt_key(e.prompt) for e in examples for c in e.completions}
    used = []
    for before, after in zip(examples, done, strict=True):
        assert len(after.partners) == len(before.completions)
        for partner in after.partners:
            (source,) = [c for c in owner if c[: len(partner)] == tuple(partner.tolist())]
            assert owner[source] != prompt_key(before.prompt), "a partner answers another prompt"
            assert len(before.prompt) + len(partner) <= max_length
            used.append(source)
    assert sorted(used) == sorted(owner), "each completion is a partner once"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sizes", [[1, 1], [2, 2, 2], [1, 3, 2], [3, 3], [1, 1, 1, 3], [5, 2, 2, 1]])
def test_partners_are_a_derangement_by_prompt(sizes, seed):
    counter = iter(range(1000))
    rows = [example(i, (i,), *((next(counter), 50 + i, 60) for _ in range(size))) for i, size in enumerate(sizes)]
    check_partners(rows, assign_partners(rows, seed, 100))


def test_rows_with_one_prompt_count_as_one_prompt():
    rows = [example(i, (7, 7) if i in (0, 3) else (i,), (i, 40), (i, 41)) for i in range(4)]
    check_partners(rows, assign_partners(rows, 0, 100))


def test_partners_are_pinned_and_follow_the_seed():
    rows = [example(i, (i,), (10 + i,), (20 + i,)) for i in range(4)]
    assert [[int(p[0]) for p in e.partners] for e in assign_partners(rows, 0, 100)] == [[13, 23], [10, 20], [11, 21], [12, 22]]
    assert [[int(p[0]) for p in e.partners] for e in assign_partners(rows, 1, 100)] == [[12, 22], [10, 20], [13, 23], [11, 21]]


def test_partners_are_cut_on_the_right_to_fit():
    rows = [example(0, (1,) * 6, (2, 2)), example(1, (3,), (4, 5, 6, 7, 8))]
    a, b = assign_partners(rows, 0, 8)
    assert a.partners[0].tolist() == [4, 5]
    assert b.partners[0].tolist() == [2, 2]


def test_prompt_that_owns_more_than_half_is_named():
    rows = [example(1, (1,), (2,)), example(2, (9,), (3,), (4,)), example(3, (9,), (5,))]
    with pytest.raises(DataError) as error:
        assign_partners(rows, 0, 100)
    assert str(error.value) == (
        "f:2: its prompt owns 3 of 4 completions; KTO compares each with a completion of another prompt, so no prompt may own more than half. "
        "Add rows with other prompts, or use another loss (dpo, sft)."
    )
    with pytest.raises(DataError, match=r"^f:1: its prompt owns 1 of 1 completion;"):
        assign_partners(rows[:1], 0, 100)


def test_no_rows_need_no_partners():
    assert assign_partners([], 0, 100) == []
