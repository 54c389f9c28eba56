"""Scorers by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from upo.errors import ConfigError, did_you_mean
from upo.losses.options import defaults, typed
from upo.rewards.base import Scorer
from upo.rewards.classifier import Classifier
from upo.rewards.column import Column
from upo.rewards.diversity import Diversity
from upo.rewards.format import Format
from upo.rewards.implicit import Implicit
from upo.rewards.json_schema import Json
from upo.rewards.judge import Judge
from upo.rewards.length import Length
from upo.rewards.length_match import LengthMatch
from upo.rewards.pattern import Pattern
from upo.rewards.profanity import Profanity
from upo.rewards.python import Python
from upo.rewards.readability import Readability
from upo.rewards.repetition import Repetition
from upo.rewards.reward_model import RewardModel
from upo.rewards.sentiment import Sentiment
from upo.rewards.toxicity import Toxicity

ALL: tuple[type[Scorer], ...] = (
    Readability, Length, LengthMatch, Repetition, Diversity, Sentiment, Profanity, Toxicity, Classifier, RewardModel, Implicit, Judge, Pattern, Json, Format,
    Column, Python,
)  # fmt: skip
SCORERS: dict[str, type[Scorer]] = {scorer.name: scorer for scorer in ALL}


def build_scorer(name: str, allow_code: bool = False, **options: Any) -> Scorer:
    """The scorer with these options, checked to work. Raises ConfigError for an unknown scorer or option, or code that is not allowed."""
    scorer = make_scorer(name, options)
    if name == Python.name and not allow_code:
        raise ConfigError("scorer python runs code named by the configuration. If you trust it, add --allow-code to the command.")
    scorer.check()
    return scorer


def make_scorer(name: str, options: Mapping[str, Any]) -> Scorer:
    """The scorer with these options, of which nothing is loaded, opened or run. Raises ConfigError for an unknown scorer or option."""
    if name not in SCORERS:
        raise ConfigError(f'unknown scorer "{name}".{did_you_mean(name, SCORERS)}')
    return SCORERS[name](**options_of(SCORERS[name], f"scorer {name}", options))


def options_of(kind: type, what: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given options in the types of their defaults. Raises ConfigError, naming `what` has them: one that is unknown or of another type."""
    known = defaults(kind)
    for option in given:
        if option not in known:
            there = did_you_mean(option, known) if known else " It has no options."
            raise ConfigError(f'{what} has no option "{option}".{there}')
    try:
        return {option: typed(what, option, known[option], value) for option, value in given.items()}
    except ValueError as error:
        raise ConfigError(f"{error}.") from None


def unique_label(scorer: Scorer, taken: Sequence[str]) -> str:
    """The scorer's label, numbered where it is taken: length, length#2, ..."""
    numbered = (f"{scorer.title}#{n}" if n > 1 else scorer.title for n in range(1, len(taken) + 2))
    return next(label for label in numbered if label not in taken)
