"""A reward model: one number for a whole conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from upo.errors import ConfigError
from upo.losses.options import option
from upo.rewards.base import Answer, Card
from upo.rewards.models import ModelScorer


@dataclass(frozen=True)
class RewardModel(ModelScorer):
    """The single output of a reward model for prompt and answer: `{scorer: reward_model, model: OWNER/NAME, normalise: zscore}`.

    model: hub id or folder of a sequence classifier with one output, safetensors weights; nothing in it is run as code. input: `chat`, the
    conversation under the model's own chat template (a plain prompt is a user's turn), or `pair`, prompt and answer as two texts, for
    encoders. What is longer than the model reads loses its beginning (chat) or its end (pair), with a warning. The scale is the model's
    own; `normalise` brings it to that of other goals.
    """

    input: str = option("chat", choices=("chat", "pair"))

    name: ClassVar[str] = "reward_model"
    version: ClassVar[str] = "1"
    card: ClassVar[Card] = Card(
        measures="What the reward model's annotators preferred, with its biases: mostly length and tone.",
        range=None,
        higher="better",
        speed="a pass of the model an answer: for large ones a GPU",
        licence="that of the model",
        offline="from a folder, or once the model is in the hub's cache; needs PyTorch",
    )
    reads: ClassVar[tuple[str, ...]] = ("turns", "text")
    lost: ClassVar[str] = "their beginning or, as a pair, their end"

    def judge(self, classifier: Any) -> Callable[[Sequence[Answer]], Sequence[float]]:
        if len(classifier.labels) != 1:
            raise ConfigError(
                f"reward_model: {self.model} has {len(classifier.labels)} outputs ({', '.join(classifier.labels)}), a reward model has one. "
                "Use {scorer: classifier, label: ...}."
            )

        def score(answers: Sequence[Answer]) -> Sequence[float]:
            if self.input == "pair":
                logits = classifier.texts([a.prompt for a in answers], [a.text for a in answers])
            else:
                logits = classifier.conversations([[*a.turns, {"role": "assistant", "content": a.text}] for a in answers])
            return [float(value) for value in logits[:, 0]]

        return score
