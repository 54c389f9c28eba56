"""The value head's start: fitted on the scored training rows before the first step."""

from __future__ import annotations

from upo.backend import Learner
from upo.data.batch import Example, collate
from upo.training.prompts import prompt_states
from upo.training.reporter import Reporter


def fit_value(learner: Learner, examples: list[Example], reporter: Reporter) -> dict[str, float]:
    """Fit V on every prompt's hidden state and its completions' rewards. Returns what the learner has to say about it.

    Learned online from its initial state V swings and the weights exp(temperature * (R - V)) explode; fitted first it starts where the
    rewards are. Prompts are computed over all ranks, and every rank fits the same head.
    """
    batch = collate(examples)
    assert batch.reward is not None
    return learner.fit_value(prompt_states(learner, examples, "value head", reporter), batch.forest.owner, batch.reward)
