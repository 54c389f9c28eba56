"""Goals on freshly sampled answers: which scorers can judge them, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from upo.backend import Learner, Sampling
from upo.config import EvaluationConfig, RewardConfig, RunConfig
from upo.data.batch import Example
from upo.data.control import Control
from upo.data.forest import Tokens
from upo.data.tokenizer import Tokenizer
from upo.errors import ConfigError, UpoError
from upo.evaluation.answers import read, repetition
from upo.rewards import Answer, Scorer, TextScorer, validate_rewards
from upo.rewards import Goal as Fitted
from upo.rewards.normalise import Normaliser
from upo.training.reporter import Reporter, WarningsOnly

NAME = "goal/"  # a goal's name among the metrics


@dataclass(frozen=True)
class Goal:
    """A scorer of texts with its weight in the total; a negative weight is for something to avoid."""

    label: str
    scorer: Scorer
    weight: float = 1.0
    normaliser: Normaliser = field(default_factory=Normaliser)  # what the weight applies to, in the total


@dataclass(frozen=True)
class Question:
    """A held-out prompt."""

    tokens: Tokens
    text: str


def goals_of(config: RunConfig, allow_code: bool, reporter: Reporter, fitted: Sequence[Fitted] = ()) -> list[Goal]:
    """The goals of `evaluation.goals`, else the objective's, with the normalisation that was `fitted` for them. Raises ConfigError.

    A column of the data says nothing about new texts: among the objective's goals it is left out, and said.
    """
    own = config.evaluation.goals
    if not own:
        goals = text_goals(config.objective.goals, config.objective.goals_key, True, allow_code, reporter)
        known = {goal.label: goal.normaliser for goal in fitted}
        return [replace(goal, normaliser=known.get(goal.label, goal.normaliser)) for goal in goals]
    return text_goals(own, "evaluation.goals", False, allow_code, reporter)


def text_goals(rewards: Sequence[RewardConfig], key: str, skip: bool, allow_code: bool, reporter: Reporter) -> list[Goal]:
    """Those that can score new texts. The others are left out with a message (`skip`), or refused: ConfigError beginning with `key`."""
    goals = []
    for i, (label, scorer, weight) in enumerate(validate_rewards(rewards, allow_code, key)):
        if isinstance(scorer, TextScorer):
            goals.append(Goal(label, scorer, weight, Normaliser(clip=rewards[i].clip)))
        elif skip:
            reporter.info(f"Goal {label} stands in the data, so it cannot score sampled answers: it is left out of them.")
        else:
            raise ConfigError(f"{key}.{i}: {label} stands in the data and cannot score sampled answers. Name a scorer of texts.")
    return goals


def questions_of(examples: Sequence[Example], most: int, control: Control | None = None) -> list[Question]:
    """The first distinct prompts of the rows, asking for good answers where answers stand behind control texts."""
    found: dict[bytes, Question] = {}
    for example in examples:
        found.setdefault(example.prompt.tobytes(), Question(control.after(example.prompt) if control else example.prompt, example.prompt_text))
    return list(found.values())[:most]


def score_answers(goals: Sequence[Goal], prompts: Sequence[str], answers: Sequence[Sequence[str]], reporter: Reporter) -> dict[str, np.ndarray]:
    """Label -> [prompts, samples] float64. Raises an UpoError naming the scorer or the prompt."""
    rows = [Answer(f"prompt {i + 1}", prompt, text) for i, (prompt, texts) in enumerate(zip(prompts, answers, strict=True)) for text in texts]
    shape = (len(answers), -1)
    return {goal.label: np.array(goal.scorer.score(rows, reporter), np.float64).reshape(shape) for goal in goals}


class Fresh:
    """Answers to held-out prompts sampled from the policy as it is, in numbers for an evaluation line.

    Rank r samples and scores answers r, r + W, ...; all ranks get the same numbers. A goal that cannot be scored is NaN, with a warning:
    training does not end because a judge is away.
    """

    def __init__(
        self, learner: Learner, tokenizer: Tokenizer, questions: Sequence[Question], options: EvaluationConfig, goals: Sequence[Goal], seed: int, reporter: Reporter
    ) -> None:
        self.learner, self.tokenizer, self.goals, self.reporter = learner, tokenizer, goals, WarningsOnly(reporter)
        self.questions = [question for question in questions for _ in range(options.samples)]
        rank, size = learner.comm.rank, learner.comm.size
        self.mine = slice(rank, None, size)
        self.sampling = Sampling(options.max_tokens, options.temperature, options.top_p, seed, place=rank, stride=size)

    def __call__(self) -> dict[str, float]:
        """`goal/<label>` as scored, `goals` (each times its weight, normalised as in training) and `answers/*`: means over all answers."""
        asked = self.questions[self.mine]
        made = self.learner.generate([q.tokens for q in asked], self.sampling) if asked else []
        texts = [read(self.tokenizer, tokens, self.sampling) for tokens in made]
        rows: dict[str, Sequence[float]] = {
            "answers/words": [len(text.split()) for text in texts],
            "answers/repetition": [repetition(text) for text in texts],
            "answers/empty": [not text.split() for text in texts],
        }
        answers = [Answer(f"held-out prompt {i}", q.text, text) for i, (q, text) in enumerate(zip(asked, texts, strict=True), 1)]
        total = np.zeros(len(asked))
        for goal in self.goals:
            rows[NAME + goal.label] = scores = self._score(goal, answers)
            total += goal.weight * np.array(goal.normaliser(scores))
        if self.goals:
            rows["goals"] = total.tolist()
        numbers = np.zeros((len(rows), len(self.questions)), np.float32)
        for row, values in zip(numbers, rows.values(), strict=True):
            row[self.mine] = values
        return dict(zip(rows, self.learner.comm.all_sum(numbers).astype(np.float64).mean(axis=1).tolist(), strict=True))

    def _score(self, goal: Goal, answers: Sequence[Answer]) -> Sequence[float]:
        if not answers:
            return []
        try:
            return goal.scorer.score(answers, self.reporter)
        except UpoError as error:
            self.reporter.warn(f"Goal {goal.label} could not be scored on sampled answers, and is missing in this evaluation: {error}")
            return [float("nan")] * len(answers)
