"""Harmless language: the safety reward of UPO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from upo.errors import ConfigError, ModelError
from upo.rewards.base import Answer, Card
from upo.rewards.classifier import sigmoid
from upo.rewards.models import ModelScorer


@dataclass(frozen=True)
class Toxicity(ModelScorer):
    """Harmlessness by a multi-label toxicity classifier: 1 - the highest probability of any of its labels.

        R2 = 1 - max_i r_i

    with r_i the sigmoid of label i (toxic, severe_toxic, obscene, threat, insult, identity_hate for the default model, which is Detoxify's
    "original"). Paper: UPO, section 4; its printed formula, max_i (1 - r_i), is nearly constant and cannot be meant. Where the weights
    cannot be had, `profanity` is a weaker stand-in that needs no network; it is never put in silently. For a classifier with one label for
    harmful text use `classifier` with a negative weight.
    """

    model: str = "unitary/toxic-bert"

    name: ClassVar[str] = "toxicity"
    version: ClassVar[str] = "1"
    card: ClassVar[Card] = Card(
        measures="Absence of toxic language. Follows words more than intent, and rates mentions of minorities as worse than they are.",
        range=(0.0, 1.0),
        higher="less toxic",
        speed="a pass of a 110 M model an answer: slow on a CPU",
        licence="unitary/toxic-bert: Apache-2.0; another model: its own",
        offline="from a folder, or once the model is in the hub's cache (440 MB); needs PyTorch",
    )

    def judge(self, classifier: Any) -> Callable[[Sequence[Answer]], Sequence[float]]:
        if classifier.kind == "single_label_classification":
            raise ConfigError(f"toxicity: {self.model} chooses one of its labels ({', '.join(classifier.labels)}). Use {{scorer: classifier, label: ...}}.")

        def score(answers: Sequence[Answer]) -> Sequence[float]:
            return [1.0 - float(p) for p in sigmoid(classifier.texts([a.text for a in answers])).max(axis=-1)]

        return score

    def identity(self) -> str:
        try:
            return super().identity()
        except ModelError as error:
            raise ModelError(f"scorer toxicity: {error} Without its weights: {{scorer: profanity}}, a stand-in that is installed with upo[rewards].") from None
