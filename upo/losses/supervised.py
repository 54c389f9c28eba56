"""Plain likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from upo.losses.base import Data, Loss, Scores, Unit
from upo.ops import Array, Ops


@dataclass(frozen=True)
class SFT(Loss):
    """Supervised fine-tuning on the chosen (or desirable) completions.

        L(y) = -(1 / |y|) log pi(y|x)

    The mean over a completion's tokens, then over chosen completions: a long answer weighs as much as a short one. One value per
    completion, [N], 0 for those not chosen; divided by the number of chosen completions.

    Elsewhere: TRL's "sft" term is the mean over all tokens of the micro-batch, so long answers weigh more and the value depends on
    accumulation; LLaMA-Factory has this form.
    """

    name: ClassVar[str] = "sft"
    unit: ClassVar[Unit] = "chosen"
    data: ClassVar[Data] = "chosen"
    source: ClassVar[str] = "maximum likelihood; as a regulariser: Pang et al. 2024, arXiv 2404.19733, eq. 1"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        return ops.where(scores.label > 0, -scores.mean_logp(), 0.0)

    def implicit_reward(self, scores: Scores) -> Array:
        return scores.mean_logp()


@dataclass(frozen=True)
class CSFT(Loss):
    """Conditional supervised fine-tuning: likelihood of good and bad completions alike, each behind a text that says which it is.

        L(y) = -(1 / |y|) log pi(y|x)

    y begins with the control text of its label (`data.control: ["<|good|>", "<|bad|>"]`, which this loss asks for), and answers are sampled
    behind the good one. The text is encoded by the model's own vocabulary and is among the |y| tokens. One value per completion, [N].
    `accuracy` compares completions behind different texts, so it says little.

    Elsewhere: HALOs sums over tokens; Korbak et al. add the two texts to the vocabulary, and condition on rewards.
    """

    name: ClassVar[str] = "csft"
    unit: ClassVar[Unit] = "completion"
    data: ClassVar[Data] = "labels"
    needs: ClassVar[frozenset[str]] = frozenset({"control"})
    source: ClassVar[str] = "Korbak et al. 2023, arXiv 2302.08582, conditional training; CSFT in Ethayarajh et al. 2024, arXiv 2402.01306; ContextualAI/HALOs"

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        return -scores.mean_logp()

    def implicit_reward(self, scores: Scores) -> Array:
        return scores.mean_logp()
