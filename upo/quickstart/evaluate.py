"""The quickstart's figures: plainness, length and repetition of the answers before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from upo.backend import Learner, Sampling
from upo.data.tokenizer import Tokenizer
from upo.evaluation.answers import Answers, sample, style
from upo.evaluation.change import change
from upo.training.reporter import Reporter

SAMPLING = Sampling(max_tokens=48, temperature=0.7, top_p=0.95, seed=0, batch_size=80)
SAMPLES = 8


@dataclass(frozen=True)
class Measured:
    """One set of answers."""

    reward: float  # auxiliary reward, mean over answers
    grade: float  # school grade, mean over answers that have one
    words: float  # as in `upo.evaluation.answers.Style`, like the rest
    repetition: float
    empty: int


def answer(learner: Learner, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling, reporter: Reporter, phase: str) -> Answers:
    """SAMPLES answers to each question."""
    tokens = [tokenizer.prompt_ids([{"role": "user", "content": p}]) for p in prompts]
    return sample(learner, tokenizer, tokens, SAMPLES, sampling, reporter, phase)


def measure(answers: Answers, rewards: np.ndarray, grade: Callable[[str], float | None]) -> Measured:
    """`rewards` [prompts, samples]; `grade` gives None for a text it cannot grade."""
    texts = [text for samples in answers for text in samples]
    grades = [g for g in map(grade, texts) if g is not None]
    return Measured(float(np.mean(rewards)), float(np.mean(grades)) if grades else float("nan"), **asdict(style(texts)))


def compare(before: Answers, after: Answers, rewards: Callable[[Answers], np.ndarray], grade: Callable[[str], float | None]) -> dict[str, Any]:
    """{"before": ..., "after": ..., "change": ...} for JSON; `rewards` scores a set of answers, [prompts, samples]."""
    old, new = rewards(before), rewards(after)
    return {
        "before": asdict(measure(before, old, grade)),
        "after": asdict(measure(after, new, grade)),
        "reward_change": asdict(change(old, new)),
    }
