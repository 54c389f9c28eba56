"""Answers sampled from a model, and what can be counted in them without judging: length, repetition, emptiness."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from upo.backend import Learner, Sampling
from upo.data.forest import Tokens
from upo.data.tokenizer import Tokenizer
from upo.training.reporter import Reporter

Answers = list[list[str]]  # [prompts][samples]
_END = re.compile(r"[.!?][\"”’)]*(?=\s|$)")
_NO_END = re.compile(r"(?:^|[\s(\"“])(?:\d{1,2}|Mr|Mrs|Ms|Dr|St|vs|etc|e\.g|i\.e)\.$")


@dataclass(frozen=True)
class Style:
    """What a set of answers looks like, whatever it says."""

    words: float  # mean per answer
    repetition: float  # share of an answer's word trigrams that it has used before, mean over answers
    empty: int  # answers without a word


def sample(
    learner: Learner, tokenizer: Tokenizer, prompts: Sequence[Tokens], samples: int, sampling: Sampling, reporter: Reporter, phase: str
) -> Answers:
    """`samples` answers to each prompt (token ids). The same sampling before and after training, so that less of a difference is chance."""
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    reporter.start(phase, len(repeated), "answers")
    texts = [read(tokenizer, made, sampling) for made in learner.generate(repeated, sampling)]
    reporter.advance(len(repeated))
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]


def read(tokenizer: Tokenizer, made: Tokens, sampling: Sampling) -> str:
    """The text of generated tokens.

    An answer stopped by the token limit is taken up to its last complete sentence, if it has one: a sentence broken off counts as a short
    one and flatters a reading level, and training, which teaches where to end, would remove that from one side of a comparison only.
    """
    text = tokenizer.decode(made).strip()
    return whole_sentences(text, ended=len(made) < sampling.max_tokens) or text


def whole_sentences(text: str, ended: bool) -> str | None:
    """The text up to its last complete sentence, so that the end of turn after it is true; None if there is none.

    `ended`: the model itself ended here, so nothing is cut. The number of a list item ("2.") or an abbreviation ("Mr.") does not end a sentence.
    """
    text = text.strip()
    if ended:
        return text or None
    ends = sentence_ends(text)
    return text[: ends[-1]] if ends else None


def sentence_ends(text: str) -> list[int]:
    """Where its sentences end, after the mark and closing quotes."""
    return [m.end() for m in _END.finditer(text) if not _NO_END.search(text[: m.end()])]


def style(texts: Sequence[str]) -> Style:
    """Of at least one answer."""
    return Style(
        words=float(np.mean([len(t.split()) for t in texts])),
        repetition=float(np.mean([repetition(t) for t in texts])),
        empty=sum(not t.split() for t in texts),
    )


def repetition(text: str) -> float:
    """Share of word trigrams that occurred before in the text; 0 for fewer than three words."""
    said = text.lower().split()
    trigrams = list(zip(said, said[1:], said[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0
