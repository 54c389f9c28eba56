"""Makes the bundled pairs again: `python -m upo.quickstart.make_data [--backend torch|mlx] [--out FOLDER]`, about five minutes on a CPU.

Answers to the questions of `prompts.jsonl` are sampled from the model itself, cut at their last complete sentence, labelled by
the rule of `pairs.choose_pairs` and written as TRL preference rows. Same backend, same versions: same rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from upo.backend import Learner, Sampling, get_backend
from upo.data.tokenizer import Tokenizer, load_tokenizer
from upo.evaluation.answers import whole_sentences
from upo.quickstart.model import model_folder
from upo.quickstart.pairs import Pair, choose_pairs
from upo.quickstart.recipe import HERE, prompts, recipe
from upo.rewards.english import words
from upo.rewards.readability import Readability
from upo.training.reporter import Reporter, Silent

SAMPLING = Sampling(max_tokens=48, temperature=0.8, top_p=0.95, seed=10_000, batch_size=80)
CHUNK = 5  # prompts sampled at once
SHORTEST = 5  # words
PAIRS = {"train": (120, 2), "heldout": (80, 2)}  # at most: how many, and how many of each prompt
SAMPLES = 16  # to each prompt


class Printed(Silent):
    """Phases and messages on stderr."""

    def info(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def start(self, phase: str, total: int, unit: str) -> None:
        self.done, self.total, self.unit = 0, total, unit

    def advance(self, done: int) -> None:
        self.done += done
        self.info(f"{self.done} of {self.total} {self.unit}")


def readability(text: str) -> float:
    """R1, the goal that the label must say nothing about."""
    return Readability().one(text)


def sample(learner: Learner, tokenizer: Tokenizer, questions: Sequence[str], sampling: Sampling, reporter: Reporter) -> list[list[str]]:
    """Distinct usable answers to each question, at most SAMPLES. A question's answers depend on those before it in its CHUNK only."""
    found: list[list[str]] = []
    reporter.start("sample", SAMPLES * len(questions), "answers")
    for start in range(0, len(questions), CHUNK):
        chunk = questions[start : start + CHUNK]
        ids = [tokenizer.prompt_ids([{"role": "user", "content": q}]) for q in chunk for _ in range(SAMPLES)]
        made = learner.generate(ids, replace(sampling, seed=sampling.seed + start))
        for i in range(len(chunk)):
            texts: list[str] = []
            for tokens in made[i * SAMPLES : (i + 1) * SAMPLES]:
                text = whole_sentences(tokenizer.decode(tokens), ended=len(tokens) < sampling.max_tokens)
                if text is not None and len(words(text)) >= SHORTEST and text not in texts:
                    texts.append(text)
            found.append(texts)
        reporter.advance(len(ids))
    return found


def row(pair: Pair) -> dict[str, Any]:
    """TRL's conversational preference layout with an explicit prompt."""
    return {
        "prompt": [{"role": "user", "content": pair.prompt}],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    }


def label_correlation(pairs: Sequence[Pair], measure: Callable[[str], float]) -> float:
    """Correlation of the label (+1 chosen, -1 rejected) with a measure of the text, over all completions."""
    label = np.tile([1.0, -1.0], len(pairs))
    return float(np.corrcoef(label, [measure(t) for p in pairs for t in (p.chosen, p.rejected)])[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's preference pairs again.")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--out", type=Path, default=HERE / "data", help="folder for train.jsonl and heldout.jsonl")
    options = parser.parse_args()
    reporter = Printed()
    folder = model_folder(reporter)
    backend = get_backend(options.backend)
    config = recipe(folder, options.backend, overrides=[f"dtype={backend.fast_dtype()}"])
    tokenizer, learner = load_tokenizer(folder), backend.load(config)
    for number, (split, (wanted, each)) in enumerate(PAIRS.items()):
        questions = prompts(split)
        answers = sample(learner, tokenizer, questions, replace(SAMPLING, seed=SAMPLING.seed + 1000 * number), reporter)
        pairs = choose_pairs(list(zip(questions, answers, strict=True)), each, readability)[:wanted]
        path = options.out / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row(p), ensure_ascii=False) + "\n" for p in pairs), encoding="utf-8")
        print(
            f"{sum(map(len, answers))} of {SAMPLES * len(questions)} answers are usable and distinct\n"
            f"{path}: {len(pairs)} pairs of {len({p.prompt for p in pairs})} prompts; correlation of the label with readability "
            f"{label_correlation(pairs, readability):+.3f}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
