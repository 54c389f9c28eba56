"""What a reward scorer is: a function of answers to numbers, with a name, a version and a range."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar

from upo.errors import DataError, UpoError
from upo.rewards.cache import RewardCache
from upo.train.reporter import Reporter, Silent


@dataclass(frozen=True)
class Answer:
    """One completion as a scorer sees it."""

    origin: str  # "train.jsonl:17"
    prompt: str
    text: str
    columns: Mapping[str, float] = field(default_factory=dict)  # the row's numeric columns, for this completion


@dataclass(frozen=True)
class Scorer:
    """A reward: its fields are its options, its docstring is its documentation. Higher is better; a negative weight turns it round."""

    name: ClassVar[str]
    version: ClassVar[str]  # raised whenever the same text may score differently
    range: ClassVar[tuple[float, float] | None]  # None: any number
    card: ClassVar[str]  # one line: what it measures, and what it does not

    @property
    def label(self) -> str:
        """Name of its column in results."""
        return self.name

    def check(self) -> None:
        """Raises UpoError for whatever would fail later: a package that is missing, a function that does not exist."""

    def score(self, answers: Sequence[Answer], reporter: Reporter | None = None) -> list[float]:
        """One finite number per answer. Raises DataError naming the row's origin."""
        raise NotImplementedError


@dataclass(frozen=True)
class TextScorer(Scorer):
    """A scorer of texts: each distinct (prompt, completion) is scored once, and remembered on disk under scorer, version and options."""

    uses_prompt: ClassVar[bool] = False
    cached: ClassVar[bool] = True

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> Sequence[float]:
        """One number per completion."""
        raise NotImplementedError

    def identity(self) -> str:
        """Scorer, version and options: whatever the score depends on besides the text."""
        return json.dumps([self.name, self.version, asdict(self)], sort_keys=True)

    def score(self, answers: Sequence[Answer], reporter: Reporter | None = None) -> list[float]:
        keys = [self._key(answer) for answer in answers]
        distinct = dict(zip(keys, answers, strict=True))
        cache = RewardCache(self.name, self.identity(), reporter or Silent()) if self.cached else None
        known = cache.read(distinct) if cache else {}
        todo = [key for key in distinct if key not in known]
        values = self([distinct[key].prompt for key in todo], [distinct[key].text for key in todo]) if todo else []
        new = dict(zip(todo, self._checked(values, [distinct[key] for key in todo]), strict=True))
        if cache:
            cache.write(new)
        known.update(new)
        return [known[key] for key in keys]

    def _key(self, answer: Answer) -> bytes:
        parts = [answer.prompt, answer.text] if self.uses_prompt else [answer.text]
        return hashlib.sha256(json.dumps(parts).encode()).digest()

    def _checked(self, values: Sequence[float], answers: Sequence[Answer]) -> list[float]:
        try:
            values = list(values)
        except TypeError:
            raise UpoError(f"scorer {self.label}: returned {type(values).__name__} instead of a list of numbers.") from None
        if len(values) != len(answers):
            raise UpoError(
                f"scorer {self.label}: returned {len(values)} numbers for {len(answers)} completions. It must return one for each, in order."
            )
        checked = []
        for value, answer in zip(values, answers, strict=True):
            try:
                if isinstance(value, (str, bytes)):
                    raise TypeError
                number = float(value)
            except (TypeError, ValueError, OverflowError):
                raise DataError(
                    f"{answer.origin}: scorer {self.label} returned {str(value)[:40]!r}, which is not a number."
                ) from None
            if not math.isfinite(number):
                raise DataError(
                    f"{answer.origin}: scorer {self.label} returned {number}. Every completion needs a finite reward."
                )
            checked.append(number)
        return checked
