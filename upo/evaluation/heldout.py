"""Held-out rows under the policy and the reference: what a preference loss takes them to be worth, KL and perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from upo.backend import Learner, Outcome
from upo.config import RunConfig
from upo.data.batch import Batch, Example, collate, micro_batches
from upo.errors import NonFiniteError
from upo.learner import scores_of
from upo.losses import DPO, Loss
from upo.sharing import row_of
from upo.training.metrics import bad_rows, credit, margins, name_rows, score_metrics
from upo.training.reference import with_reference
from upo.training.reporter import Reporter


@dataclass(frozen=True)
class HeldOut:
    """Rows that carry their reference log-probs."""

    batch: Batch
    loss: Loss  # says what a completion is worth

    @classmethod
    def of(cls, config: RunConfig, learner: Learner, backend: str, examples: Sequence[Example], reporter: Reporter) -> HeldOut:
        """Scores the reference, unless its cache has these rows."""
        bare, known = [replace(e, anchor=None) for e in examples], len(learner.info.notes)
        learner.check_sharing(row_of(bare))  # before anything is scored, as in training
        for note in learner.info.notes[known:]:
            reporter.info(note)
        rows = with_reference(config, learner, backend, bare, "held-out rows", reporter).examples
        terms = config.objective.build().preference
        return cls(collate(rows), terms[0].loss if terms else DPO())

    def metrics(self, learner: Learner) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """The numbers of the policy as it is, and by name the values per pair behind `accuracy` and `margin`. Raises NonFiniteError."""
        logp = np.zeros(len(self.batch.label), np.float32)
        for rows in micro_batches(self.batch, learner.info.micro_batch_tokens, layout=learner.info.layout, device=learner.info.device):
            part, places = self.batch.select(rows)
            logp[places.completions] = learner.logps(part.forest)
        if bad := bad_rows(self.batch, logp):
            raise NonFiniteError(f"The evaluation has log-probs that are not finite, in {name_rows(bad)}. The adapter is damaged, or dtype: float16 too narrow.")
        scores = scores_of(self.batch, Outcome(logp))
        found = margins(self.loss, scores) if len(scores.chosen) else None
        by_pair = {} if found is None else {"accuracy": credit(found), "margin": found}
        return score_metrics(self.loss, scores), by_pair
