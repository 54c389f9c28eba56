"""Auxiliary rewards: scorers by name, and the weighted sum that UPO optimises, computed once before training."""

from __future__ import annotations

from upo.rewards.base import Answer, Card, Scorer, TextScorer
from upo.rewards.registry import SCORERS, build_scorer, make_scorer, unique_label
from upo.rewards.total import Goal, answers_of, score_examples, validate_rewards

__all__ = [
    "SCORERS",
    "Answer",
    "Card",
    "Goal",
    "Scorer",
    "TextScorer",
    "answers_of",
    "build_scorer",
    "make_scorer",
    "score_examples",
    "unique_label",
    "validate_rewards",
]
