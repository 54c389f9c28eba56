"""What a reward scorer is: a function of answers to numbers, with a name, a version and a card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple

from upo.errors import ConfigError
from upo.losses.options import check_options
from upo.rewards.scoring import score_texts
from upo.rewards.workers import WORTH_IT, cores, workers
from upo.training.reporter import Reporter, Silent


@dataclass(frozen=True)
class Answer:
    """One completion as a scorer sees it."""

    origin: str  # "train.jsonl:17"
    prompt: str
    text: str
    columns: Mapping[str, float] = field(default_factory=dict)  # the row's numeric columns, for this completion
    chosen: str | None = None  # the row's preferred completion, where it has one
    turns: tuple[Mapping[str, Any], ...] = ()  # the prompt as messages; a plain one is a user's turn


@dataclass(frozen=True)
class Card:
    """What one must know before using a scorer."""

    measures: str  # and what it does not, in one line
    range: tuple[float, float] | None  # None: any number
    higher: str  # what a high score means
    speed: str  # order of magnitude
    licence: str  # of the model, lexicon or formula behind it
    offline: str  # yes, or what it needs from the network


class Ready(NamedTuple):
    """A scorer with all that it needs at hand."""

    score: Callable[[Sequence[Answer]], Any]  # what it returns is checked
    parallel: int = 1  # batches at once


@dataclass(frozen=True)
class Scorer:
    """A reward: its fields are its options, its docstring is its documentation. Higher is better; a negative weight turns it round."""

    name: ClassVar[str]
    version: ClassVar[str]  # raised whenever the same text may score differently
    card: ClassVar[Card]

    def __post_init__(self) -> None:
        try:
            check_options(self, self.name, missing="must be given")
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @property
    def title(self) -> str:
        """Name of its column in results."""
        return self.name

    def check(self) -> None:
        """Raises UpoError for whatever would fail later: a package that is missing, a function that does not exist."""

    def score(self, answers: Sequence[Answer], reporter: Reporter | None = None) -> list[float]:
        """One finite number per answer. Raises DataError naming the row's origin."""
        raise NotImplementedError


@dataclass(frozen=True)
class TextScorer(Scorer):
    """A scorer of texts: each distinct one is scored once, in batches, and remembered on disk under scorer, version and options."""

    reads: ClassVar[tuple[str, ...]] = ("text",)  # of Answer: what the score depends on
    volatile: ClassVar[frozenset[str]] = frozenset()  # options that do not change a score
    batch: ClassVar[int] = 512  # answers at once
    isolated: ClassVar[bool] = False  # runs in a process of its own, which is ended when a batch takes longer than `limit` seconds
    one_process: ClassVar[bool] = False  # must not run several times at once
    spot_check: ClassVar[bool] = False  # whether the same text might score differently: a few are scored again

    def __call__(self, answers: Sequence[Answer]) -> Sequence[float]:
        """One number per answer."""
        raise NotImplementedError

    @property
    def remembered(self) -> bool:
        """Whether scores are kept on disk."""
        return True

    def identity(self) -> str:
        """Scorer, version and options: whatever the score depends on besides the answer."""
        options = {name: value for name, value in asdict(self).items() if name not in self.volatile}
        return json.dumps([self.name, self.version, options], sort_keys=True)

    def digest(self, answer: Answer) -> bytes:
        """Hash of what the score depends on."""
        return hashlib.sha256(json.dumps([getattr(answer, name) for name in self.reads]).encode()).digest()

    @contextmanager
    def ready(self, count: int, reporter: Reporter) -> Iterator[Ready]:
        """What scores batches of `count` answers in all; what it holds (a model, processes, a connection) is let go at the end."""
        if self.isolated or count >= WORTH_IT:
            number = cores() if count >= WORTH_IT and not self.one_process else 1
            with workers(self, number) as score:
                yield Ready(score, number)
        else:
            yield Ready(self)

    def score(self, answers: Sequence[Answer], reporter: Reporter | None = None) -> list[float]:
        return score_texts(self, answers, reporter or Silent())
