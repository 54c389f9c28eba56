"""Normalising scores: values by hand, fitted on training rows, saved with the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_learner import FakeLearner, Rows, configure

from upo.config import load_config
from upo.data.batch import Example
from upo.errors import ConfigError, RunError
from upo.rewards.normalise import KNOTS, fit
from upo.training.session import Session


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPO_CACHE", str(tmp_path / "cache"))


def test_zscore() -> None:
    normalised = fit("zscore", None, [1.0, 2.0, 3.0])  # mean 2, deviation sqrt(2/3)
    assert normalised([1.0, 2.0, 3.0, 4.0]) == pytest.approx([-(1.5**0.5), 0.0, 1.5**0.5, 2 * 1.5**0.5])
    assert fit("zscore", None, [0.1] * 7)([0.1, 5.0]) == [0.0, 0.0], "equal scores say nothing, and their rounding is no spread"


def test_quantile() -> None:
    """Half of those that are equal count as below; between scores it is a straight line, beyond them constant."""
    normalised = fit("quantile", None, [5.0, 1.0, 5.0, 9.0])
    assert normalised([1.0, 5.0, 9.0]) == [0.125, 0.5, 0.875]
    assert normalised([3.0, -7.0, 99.0]) == [0.3125, 0.125, 0.875]
    assert fit("quantile", None, [2.0, 2.0])([2.0]) == [0.5]


def test_many_scores_are_thinned_and_hardly_change() -> None:
    scores = np.random.default_rng(0).permutation(100_000) ** 2.0
    normalised = fit("quantile", None, scores.tolist())
    assert len(normalised.numbers[0]) == KNOTS
    expected = (np.sqrt(scores) + 0.5) / 100_000
    assert np.abs(np.array(normalised(scores.tolist())) - expected).max() < 1 / KNOTS


def test_clip_comes_last() -> None:
    assert fit("none", (0.0, 1.0), [0.0])([-1.0, 0.5, 7.0]) == [0.0, 0.5, 1.0]
    assert fit("zscore", (-1.0, 1.0), [1.0, 2.0, 3.0])([1.0, 2.0, 30.0]) == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("clip", [[1.0, 1.0], [2.0, 1.0], [1.0], 3.0, ["a", 1.0], [0.0, float("inf")], [False, True]])
def test_bounds_that_are_none(clip: Any) -> None:
    with pytest.raises(ConfigError, match=r"clip: must be two numbers, the lower one first"):
        configure({"preset": "upo", "auxiliary": {"rewards": [{"scorer": "length", "clip": clip}]}})


def run(out: Path, normalise: str = "zscore", resume: bool = False) -> tuple[Session, Any]:
    tokens = np.array([3], np.int32)
    goals = [{"scorer": "column", "column": "q", "normalise": normalise, "clip": [-1.25, 3.0]}]
    config = configure({"preset": "upo", "auxiliary": {"rewards": goals}}, train={"epochs": 1, "save_every": 1, "batch_size": 1})

    def row(line: int, name: str, *q: float) -> Example:
        return Example(f"{name}:{line}", "pair", np.array([5, line], np.int32), (tokens, tokens + 1), (1, -1), ("c", "r"), "p", {"q": q})

    rows = Rows([row(6, "train", 1.0, 2.0), row(7, "train", 3.0, 2.0)], [row(8, "held", 4.0, 0.0)])
    session = Session(config, out, learner=FakeLearner(config), data=rows, **({"resume": True} if resume else {}))
    return session, session.run()


def test_held_out_rows_are_brought_to_the_scale_of_the_training_rows(tmp_path: Path) -> None:
    """mean 2, deviation sqrt(1/2); 4 is 2 sqrt(2) above it, 0 as much below and clipped. Saved in the manifest, exactly."""
    from upo.training.inputs import read_inputs

    run(tmp_path / "run")
    (goal,) = json.loads((tmp_path / "run" / "manifest.json").read_text())["rewards"]
    assert goal == {
        "label": "q", "scorer": "column", "version": "1", "options": {"column": "q"}, "weight": 1.0, "normalise": "zscore", "clip": [-1.25, 3.0],
        "mean_and_deviation": [2.0, pytest.approx(0.5**0.5)],
    }  # fmt: skip
    rewards = read_inputs(tmp_path / "run").rewards
    assert rewards["train"].tolist() == pytest.approx([-1.25, 0.0, 2**0.5, 0.0])
    assert rewards["eval"].tolist() == pytest.approx([8**0.5, -1.25])
    assert load_config(tmp_path / "run" / "config.yaml").objective.goals[0].clip == (-1.25, 3.0)


def test_another_normalisation_is_another_run(tmp_path: Path) -> None:
    run(tmp_path / "run")
    with pytest.raises(RunError, match=r"rewards\.0\.normalise: 'zscore' in the run, 'quantile' now"):
        run(tmp_path / "run", "quantile", resume=True)
