"""What the value head is fitted on: every prompt's hidden state in its place, whatever the parts and ranks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from fake_learner import UPO, FakeLearner, ThreadComm, configure, pairs

from upo.errors import ModelError
from upo.training.reporter import Silent
from upo.training.value import fit_value

CONFIG = configure(UPO)
ROWS = [replace(e, reward=(0.1 * i, 0.1 * i + 1)) for i, e in enumerate(pairs(9))]


class Watched(FakeLearner):
    """Keeps what it is asked to fit; states tell prompts apart by their length and tokens."""

    def prompt_states(self, forest, *, reference=None):
        assert len(forest.completions) == 0
        self.computed = getattr(self, "computed", 0) + len(forest.prompts)
        return np.array([[len(p), p.sum(), p[-1]] for p in forest.prompts], np.float32)

    def fit_value(self, states, prompt, reward):
        self.fitted = (states, prompt, reward)
        return {"value/fit_loss": 0.5}


@pytest.mark.parametrize("limit", [1, 30, 10**6])
@pytest.mark.parametrize("ranks", [1, 2, 12])
def test_states_are_in_their_places(limit, ranks):
    learners = [Watched(CONFIG, comm) for comm in ThreadComm.make(ranks)]
    for learner in learners:
        learner.info = replace(learner.info, micro_batch_tokens=limit)
    with ThreadPoolExecutor(ranks) as pool:
        assert list(pool.map(lambda learner: fit_value(learner, ROWS, Silent()), learners)) == [{"value/fit_loss": 0.5}] * ranks
    for learner in learners:
        states, prompt, reward = learner.fitted
        np.testing.assert_array_equal(states, [[len(e.prompt), e.prompt.sum(), e.prompt[-1]] for e in ROWS])
        np.testing.assert_array_equal(prompt, np.repeat(np.arange(9), 2))
        np.testing.assert_allclose(reward, [r for e in ROWS for r in e.reward], rtol=1e-6)  # float32
    assert sum(getattr(learner, "computed", 0) for learner in learners) == len(ROWS)


def test_states_that_are_not_finite():
    learner = Watched(CONFIG)
    learner.prompt_states = lambda forest, reference=None: np.full((len(forest.prompts), 3), np.inf, np.float32)  # type: ignore[method-assign]
    with pytest.raises(ModelError, match=r"hidden states are not finite \(float32\)"):
        fit_value(learner, ROWS, Silent())
