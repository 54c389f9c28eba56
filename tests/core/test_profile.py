"""What a profile says, against numbers counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from upo.data.rows import Row
from upo.rewards.profile import profile


def pair(line: int) -> Row:
    return Row(f"d.jsonl:{line}", "pair", "p", ("c", "r"), (1, -1))


def of_pairs(*differences: float) -> tuple[list[Row], list[float]]:
    """One pair per difference, its rejected completion at 0."""
    return [pair(i) for i in range(1, len(differences) + 1)], [value for d in differences for value in (d, 0.0)]


def test_pairs_are_counted_and_conflicts_named() -> None:
    rows, scores = of_pairs(3.0, 0.0, -1.0, -2.0, 5.0)
    (goal,) = profile(rows, {"g": scores}, {"g": 1.0}).goals
    assert (goal.pairs, goal.agreeing, goal.tied, goal.conflicts) == (5, 2, 1, 2)
    assert goal.worst == (("d.jsonl:4", 2.0), ("d.jsonl:3", 1.0))
    assert (goal.mean, goal.low, goal.high) == (0.5, -2.0, 5.0)
    # covariance with the label: mean(x * label) = (3 + 0 - 1 - 2 + 5) / 10 = 0.5, as the label's mean is 0 and its deviation 1
    assert goal.preference == pytest.approx(0.5 / np.std(scores))
    assert sum(goal.counts) == 10 and len(goal.edges) == 11 and (goal.edges[0], goal.edges[-1]) == (-2.0, 5.0)
    assert goal.counts[2] == 6  # bins of 0.7: the five rejected and the tied chosen lie in [-0.6, 0.1)


def test_a_negative_weight_turns_a_goal_round() -> None:
    rows, scores = of_pairs(3.0, 0.0, -1.0)
    (goal,) = profile(rows, {"g": scores}, {"g": -2.0}).goals
    assert (goal.agreeing, goal.tied, goal.conflicts) == (1, 1, 1) and goal.worst == (("d.jsonl:1", 3.0),)


def test_a_goal_that_fights_the_preference_is_named() -> None:
    """More conflicts than agreements by over two standard errors of a fair coin: 9 to 1 is 8 > 2 sqrt(10); 7 to 3 may be chance."""
    for conflicts, weight, fights in ((9, 1.0, True), (7, 1.0, False), (9, -1.0, False), (1, -1.0, True)):
        rows, scores = of_pairs(*[-1.0 - i / 100 for i in range(conflicts)], *[1.0 + i / 100 for i in range(10 - conflicts)])
        warnings = profile(rows, {"g": scores}, {"g": weight}).warnings
        assert [w[:24] for w in warnings] == (["g fights the preference:"] if fights else []), (conflicts, weight)


def test_a_constant_goal_is_named() -> None:
    rows, _ = of_pairs(1.0, 2.0)
    result = profile(rows, {"g": [0.1] * 4}, {"g": 1.0})
    assert result.warnings == ("g is 0.1 for every completion, so it cannot steer the model. Check the data or choose another goal.",)
    assert result.goals[0].preference is None and result.goals[0].deviation == 0.0 and result.goals[0].counts == (4,)


def test_goals_are_compared_by_rank_and_added_up() -> None:
    rows, a = of_pairs(1.0, 2.0, -3.0)
    b = [np.exp(x) for x in a]
    result = profile(rows, {"a": a, "b": b, "c": [-x for x in a]}, {"a": 1.0, "b": 0.5, "c": 0.25})
    assert result.between["a"]["b"] == pytest.approx(1.0) and result.between["a"]["c"] == pytest.approx(-1.0)
    assert result.total is not None and result.total.mean == pytest.approx(np.mean([0.75 * x + 0.5 * y for x, y in zip(a, b, strict=True)]))
    assert result.warnings == (
        "a and b say nearly the same; one of them is enough (rank correlation 1.00).",
        "a and c pull against each other: what one gains the other loses (rank correlation -1.00).",
        "b and c pull against each other: what one gains the other loses (rank correlation -1.00).",
    )
    assert profile(rows, {"a": a}, {"a": 1.0}).total is None


def test_ties_share_their_rank() -> None:
    """Ranks of 1 1 2 5 are 0.5 0.5 2 3, those of 4 3 2 1 are 3 2 1 0; Pearson of these by hand: -0.9486833."""
    rows = [Row("d:1", "group", "p", ("a", "b", "c", "d"), (0, 0, 0, 0))]
    result = profile(rows, {"a": [1.0, 1.0, 2.0, 5.0], "b": [4.0, 3.0, 2.0, 1.0]}, {"a": 1.0, "b": 1.0})
    assert result.between["a"]["b"] == pytest.approx(-4.5 / (4.5 * 5.0) ** 0.5)
    assert result.goals[0].preference is None and result.goals[0].pairs == 0


def test_labels_without_pairs() -> None:
    rows = [Row(f"d:{i}", "unpaired", "p", ("t",), (1 if i % 2 else -1,)) for i in range(20)]
    against = profile(rows, {"g": [float(-row.labels[0]) for row in rows]}, {"g": 1.0})
    assert against.goals[0].preference == pytest.approx(-1.0) and against.warnings[0].startswith("g fights the labels (correlation -1.00)")
    assert profile(rows, {"g": [float(-row.labels[0]) for row in rows]}, {"g": -1.0}).warnings == ()
