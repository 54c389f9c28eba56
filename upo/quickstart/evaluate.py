"""What changed between two sets of sampled answers to the same prompts: plainness, length, repetition, and how sure one can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from upo.backend import Learner, Sampling
from upo.data.tokenizer import Tokenizer
from upo.quickstart.pairs import whole_sentences
from upo.random import words as random_words
from upo.train.reporter import Reporter

Answers = list[list[str]]  # [prompts][samples]
SAMPLING = Sampling(max_tokens=48, temperature=0.7, top_p=0.95, seed=0, batch_size=80)
SAMPLES = 8


@dataclass(frozen=True)
class Measured:
    """One set of answers."""

    reward: float  # auxiliary reward, mean over answers
    grade: float  # school grade, mean over answers that have one
    words: float  # mean per answer
    repetition: float  # share of an answer's word trigrams that it has used before, mean over answers
    empty: int  # answers without a word


@dataclass(frozen=True)
class Change:
    """A mean difference over prompts with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def answer(learner: Learner, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling, reporter: Reporter, phase: str) -> Answers:
    """SAMPLES answers to each prompt. The same seed before and after training, so that less of a difference is chance.

    An answer stopped by the token limit is taken up to its last complete sentence, if it has one: a sentence broken off counts as a short
    one and flatters the grade, and training, which teaches where to end, would remove that from one side of the comparison only.
    """
    tokens = [tokenizer.prompt_ids([{"role": "user", "content": p}]) for p in prompts for _ in range(SAMPLES)]
    reporter.start(phase, len(tokens), "answers")
    texts = []
    for made in learner.generate(tokens, sampling):
        text = tokenizer.decode(made).strip()
        texts.append(whole_sentences(text, ended=len(made) < sampling.max_tokens) or text)
    reporter.advance(len(tokens))
    return [texts[i : i + SAMPLES] for i in range(0, len(texts), SAMPLES)]


def measure(answers: Answers, rewards: np.ndarray, grade: Callable[[str], float | None]) -> Measured:
    """`rewards` [prompts, samples]; `grade` gives None for a text it cannot grade."""
    texts = [text for samples in answers for text in samples]
    grades = [g for g in map(grade, texts) if g is not None]
    return Measured(
        reward=float(np.mean(rewards)),
        grade=float(np.mean(grades)) if grades else float("nan"),
        words=float(np.mean([len(t.split()) for t in texts])),
        repetition=float(np.mean([repetition(t) for t in texts])),
        empty=sum(not t.split() for t in texts),
    )


def repetition(text: str) -> float:
    """Share of word trigrams that occurred before in the text; 0 for fewer than three words."""
    said = text.lower().split()
    trigrams = list(zip(said, said[1:], said[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def change(before: np.ndarray, after: np.ndarray, draws: int = 10_000, seed: int = 0) -> Change:
    """Mean of after - before [prompts, samples], with a 95 % percentile interval.

    Prompts are drawn with replacement, each with all its answers, since answers to one prompt are not independent.
    """
    per_prompt = np.mean(np.asarray(after, np.float64) - np.asarray(before, np.float64), axis=1)
    n = len(per_prompt)
    drawn = (random_words(draws * n, seed, "bootstrap") % np.uint64(n)).astype(np.int64).reshape(draws, n)
    low, high = np.quantile(per_prompt[drawn].mean(axis=1), [0.025, 0.975])
    return Change(float(per_prompt.mean()), float(low), float(high))


def compare(before: Answers, after: Answers, rewards: Callable[[Answers], np.ndarray], grade: Callable[[str], float | None]) -> dict[str, Any]:
    """{"before": ..., "after": ..., "change": ...} for JSON; `rewards` scores a set of answers, [prompts, samples]."""
    old, new = rewards(before), rewards(after)
    return {
        "before": asdict(measure(before, old, grade)),
        "after": asdict(measure(after, new, grade)),
        "reward_change": asdict(change(old, new)),
    }
