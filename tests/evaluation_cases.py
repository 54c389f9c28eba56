"""What the tests of evaluations share: held-out rows, a scorer that is easy to count by hand, and an ear for what is said."""

from __future__ import annotations

from fake_learner import pairs

from upo.rewards import TextScorer
from upo.training.reporter import Silent

HELD_OUT = pairs(6, seed=1, name="held_out")


class Loud(TextScorer):
    """The number of words that are `d`."""

    name = "loud"
    remembered = False

    def __call__(self, answers):
        return [answer.text.split().count("d") for answer in answers]


class Listener(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.infos: list[str] = []
        self.warnings: list[str] = []

    def info(self, text: str) -> None:
        self.infos.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
