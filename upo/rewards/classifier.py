"""Any sequence classifier as a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from upo.errors import ConfigError, did_you_mean
from upo.losses.options import option
from upo.rewards.base import Answer, Card
from upo.rewards.models import ModelScorer


@dataclass(frozen=True)
class Classifier(ModelScorer):
    """Probability that a sequence classifier gives to one label: `{scorer: classifier, model: OWNER/NAME, label: positive}`.

    model: hub id or folder, in transformers' layout with safetensors weights; nothing in it is run as code. label: one of the model's names
    for its outputs; a wrong one is refused with the list of them. The probability is the softmax over all labels or, where the model is a
    multi-label one or has a single output, the sigmoid of this one. input: the `answer` alone, or prompt and answer as a `pair` of texts.
    Longer texts than the model reads lose their end, with a warning.
    """

    label: str = ""
    input: str = option("answer", choices=("answer", "pair"))

    name: ClassVar[str] = "classifier"
    version: ClassVar[str] = "1"
    card: ClassVar[Card] = Card(
        measures="Whatever the classifier was trained to tell apart.",
        range=(0.0, 1.0),
        higher="more probably the label",
        speed="a pass of the model an answer: slow on a CPU",
        licence="that of the model",
        offline="from a folder, or once the model is in the hub's cache; needs PyTorch",
    )
    reads: ClassVar[tuple[str, ...]] = ("prompt", "text")

    @property
    def title(self) -> str:
        return self.label

    def judge(self, classifier: Any) -> Callable[[Sequence[Answer]], Sequence[float]]:
        if self.label not in classifier.labels:
            raise ConfigError(f'classifier: {self.model} has no label "{self.label}".{did_you_mean(self.label, classifier.labels)}')
        column = classifier.labels.index(self.label)
        each = classifier.kind == "multi_label_classification" or len(classifier.labels) == 1

        def score(answers: Sequence[Answer]) -> Sequence[float]:
            texts = [answer.text for answer in answers]
            logits = classifier.texts([a.prompt for a in answers], texts) if self.input == "pair" else classifier.texts(texts)
            return [float(p) for p in (sigmoid(logits) if each else softmax(logits))[:, column]]

        return score


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x), without overflow."""
    return np.exp(-np.logaddexp(0.0, -logits.astype(np.float64)))


def softmax(logits: np.ndarray) -> np.ndarray:
    """[N, L] along the last axis."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))
