"""`upo eval`: a model before and after training, on held-out rows and on freshly sampled answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from upo.backend import Learner, Sampling
from upo.data.batch import Example
from upo.data.tokenizer import Tokenizer
from upo.errors import UpoError
from upo.evaluation.answers import Answers, sample, style
from upo.evaluation.change import change
from upo.evaluation.goals import Goal, Question, score_answers
from upo.evaluation.heldout import HeldOut
from upo.evaluation.judge import Judge, win_rate
from upo.evaluation.target import Target
from upo.training.reporter import Reporter

METRICS = ("accuracy", "margin", "kl", "perplexity")  # of the held-out rows


@dataclass(frozen=True)
class Questions:
    """What is asked, how, and by what the answers are measured."""

    asked: Sequence[Question]
    samples: int
    sampling: Sampling
    goals: Sequence[Goal] = ()
    judge: Judge | None = None


def evaluate_target(
    target: Target, learner: Learner, tokenizer: Tokenizer, backend: str, rows: Sequence[Example], questions: Questions, reporter: Reporter
) -> dict[str, Any]:
    """What eval.json holds; docs/evaluation.md lists it. `learner` was loaded by the target's configuration, so it is the trained one.

    Raises an UpoError. A goal whose scorer fails is left out with a warning, as the others are worth having.
    """
    held_out = HeldOut.of(target.config, learner, backend, rows, reporter) if rows else None
    trained = learner.state()["adapter"]
    found: dict[str, tuple[dict[str, float], dict[str, np.ndarray]]] = {}
    answers: dict[str, Answers] = {}
    for when, adapter in (("before", target.before(learner)), ("after", trained)):
        learner.load_state({**learner.state(), "adapter": dict(adapter)})
        if held_out is not None:
            found[when] = held_out.metrics(learner)
        if questions.asked:
            tokens = [question.tokens for question in questions.asked]
            answers[when] = sample(learner, tokenizer, tokens, questions.samples, questions.sampling, reporter, f"answers {when}")
    info, sampling = learner.info, questions.sampling
    return {
        "run": None if target.run is None else str(target.run),
        "model": target.config.model,
        "adapter": None if target.adapter is None else str(target.adapter),
        "checkpoint": target.checkpoint,
        "step": target.step,
        "backend": backend,
        "device": info.device,
        "dtype": info.dtype,
        "rows": len(rows),
        **(_held_out(found) if found else {}),
        "prompts": len(questions.asked),
        "samples_per_prompt": questions.samples,
        "sampling": {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed},
        **(_answers(answers, questions, reporter) if answers else {"goals": {}, "win_rate": None, "samples": []}),
    }


def _held_out(found: Mapping[str, tuple[dict[str, float], dict[str, np.ndarray]]]) -> dict[str, Any]:
    (old, old_pairs), (new, new_pairs) = found["before"], found["after"]
    return {
        name: {"before": old[name], "after": new[name], **({"change": asdict(change(old_pairs[name], new_pairs[name]))} if name in old_pairs else {})}
        for name in METRICS
        if name in old and name in new
    }


def _answers(answers: Mapping[str, Answers], questions: Questions, reporter: Reporter) -> dict[str, Any]:
    before, after, prompts = answers["before"], answers["after"], [question.text for question in questions.asked]
    goals = {goal.label: scored for goal in questions.goals if (scored := _goal(goal, prompts, before, after, reporter)) is not None}
    looks = [asdict(style([text for texts in side for text in texts])) for side in (before, after)]
    for when, look in zip(("before", "after"), looks, strict=True):
        if look["empty"]:
            reporter.warn(f"{look['empty']} of {sum(map(len, after))} answers {when} are empty. They are kept, and count in every mean as the scorers see them.")
    return {
        "goals": goals,
        "answers": {name: {"before": looks[0][name], "after": looks[1][name]} for name in looks[0]},
        "win_rate": None if questions.judge is None else win_rate(questions.judge, prompts, before, after, reporter).record(),
        "samples": [{"prompt": p, "before": b, "after": a} for p, b, a in zip(prompts, before, after, strict=True)],
    }


def _goal(goal: Goal, prompts: Sequence[str], before: Answers, after: Answers, reporter: Reporter) -> dict[str, Any] | None:
    try:
        old, new = (score_answers([goal], prompts, side, reporter)[goal.label] for side in (before, after))
    except UpoError as error:
        reporter.warn(f"Goal {goal.label} could not be scored and is left out: {error}")
        return None
    return {"weight": goal.weight, "before": float(old.mean()), "after": float(new.mean()), "change": asdict(change(old, new))}


def median_sample(samples: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The prompt whose answers changed in length by the median, so that nothing is picked by eye."""
    moved = [np.mean([len(t.split()) for t in s["after"]]) - np.mean([len(t.split()) for t in s["before"]]) for s in samples]
    return samples[int(np.argsort(moved, kind="stable")[len(samples) // 2])]
