"""Learning rates, against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from upo.config import OptimizerConfig
from upo.training.schedule import lr_at


def rates(schedule: str, warmup: int, total: int) -> list[float]:
    config = OptimizerConfig(lr=2.0, schedule=schedule, warmup_steps=warmup)
    return [lr_at(config, step, total) for step in range(total)]


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
        ("linear", [1.0, 2.0, 2.0, 1.5, 1.0, 0.5]),
        ("cosine", [1.0, 2.0, 2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)]),
    ],
)
def test_rates(schedule, expected):
    assert rates(schedule, 2, 6) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup, total", [(0, 1), (0, 7), (5, 7), (7, 7), (9, 7)])
def test_every_step_learns_and_none_exceeds_the_rate(schedule, warmup, total):
    found = rates(schedule, warmup, total)
    assert all(0 < rate <= 2.0 for rate in found)
    assert found[: min(warmup, total)] == sorted(found[: min(warmup, total)])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)


def test_a_run_shorter_than_its_warm_up_never_reaches_the_rate():
    assert rates("cosine", 10, 4) == pytest.approx([0.2, 0.4, 0.6, 0.8])
