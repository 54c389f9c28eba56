"""The quickstart from the model's download to the comparison of answers before and after."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from upo.backend import get_backend
from upo.evaluation.answers import Answers
from upo.quickstart.evaluate import SAMPLES, SAMPLING, answer, compare
from upo.quickstart.model import REPOSITORY, model_folder
from upo.quickstart.recipe import prompts, recipe
from upo.report.page import write_report
from upo.rewards.grades import flesch_kincaid
from upo.rewards.readability import Readability
from upo.training.reporter import Reporter
from upo.training.session import Session

REPORT = "report.html"


def run_quickstart(
    out: Path,
    *,
    reporter: Reporter,
    backend: str = "auto",
    seed: int = 0,
    steps: int | None = None,
    model: str | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Train by the recipe into `out` and return what `out/quickstart.json` holds: figures before and after, and an example. A report is written beside it.

    Raises an UpoError for bad input or a model that cannot be had.
    """
    clock = Clock()
    recipe(model or REPOSITORY, backend, seed, steps, overrides)  # a bad option and a missing backend show before the download
    overrides = [f"dtype={get_backend(backend).fast_dtype()}", *overrides]
    folder = model or model_folder(reporter)
    clock.lap("model")
    session = Session(recipe(folder, backend, seed, steps, overrides), out, reporter=reporter)
    assert session.tokenizer is not None  # always there where the configuration names the files
    clock.lap("prepare")
    questions, sampling = prompts("heldout"), replace(SAMPLING, seed=seed)
    before = answer(session.learner, session.tokenizer, questions, sampling, reporter, "answers before")
    clock.lap("answers")
    summary = session.run()
    clock.lap("train")
    after = answer(session.learner, session.tokenizer, questions, sampling, reporter, "answers after")
    clock.lap("answers")
    result = {
        "model": str(folder),
        "backend": session.backend,
        "device": session.learner.info.device,
        "dtype": session.learner.info.dtype,
        "seed": seed,
        "steps": summary["steps"],
        "prompts": len(questions),
        "samples": SAMPLES,
        **compare(before, after, readability, grade),
        "example": example(questions, before, after),
        "seconds": clock.seconds(),
    }
    for when in ("before", "after"):
        result[when]["accuracy"] = (summary["eval"][when] or {}).get("accuracy")
    answers = [{"prompt": q, "before": b, "after": a} for q, b, a in zip(questions, before, after, strict=True)]
    if session.learner.comm.rank == 0:
        text = json.dumps({**result, "answers": answers}, indent=2, ensure_ascii=False)
        (out / "quickstart.json").write_text(text + "\n", encoding="utf-8")
        write_report([out], out / REPORT)
    return result


class Clock:
    """Seconds spent under each name, and in total."""

    def __init__(self) -> None:
        self.began = self.last = time.perf_counter()
        self.spent: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Book the time since the last lap under this name."""
        now = time.perf_counter()
        self.spent[name] = self.spent.get(name, 0.0) + now - self.last
        self.last = now

    def seconds(self) -> dict[str, float]:
        return {**self.spent, "total": self.last - self.began}


def readability(answers: Answers) -> np.ndarray:
    """R1 of each answer, [prompts, samples]."""
    return np.array([[Readability().one(text) for text in samples] for samples in answers], np.float64)


def grade(text: str) -> float | None:
    """Flesch-Kincaid grade; None for a text without words."""
    try:
        return flesch_kincaid(text)
    except ValueError:
        return None


def example(questions: Sequence[str], before: Answers, after: Answers) -> dict[str, str]:
    """The first answers to the question whose mean reward changed by the median, so that nothing is picked by eye."""
    change = (readability(after) - readability(before)).mean(axis=1)
    median = int(np.argsort(change, kind="stable")[len(change) // 2])
    return {"prompt": questions[median], "before": before[median][0], "after": after[median][0]}
