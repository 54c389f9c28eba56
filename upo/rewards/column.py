"""Rewards that are in the data already."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from upo.errors import ConfigError, DataError, did_you_mean
from upo.losses.options import option
from upo.rewards.base import Answer, Card, Scorer
from upo.training.reporter import Reporter


@dataclass(frozen=True)
class Column(Scorer):
    """A numeric column of the data, taken as it is: `{scorer: column, column: toxicity}`.

    Pairs have it as toxicity_chosen and toxicity_rejected, groups as a list, unpaired rows as a number. The column `label`, which every
    labelled row has, is +1 for chosen or desirable completions and -1 for the others.
    """

    column: str = option("", optional=True)

    name: ClassVar[str] = "column"
    version: ClassVar[str] = "1"
    card: ClassVar[Card] = Card(
        measures="A number that stands in the data: a human rating, another tool's score.",
        range=None,
        higher="whatever the column says",
        speed="no computing",
        licence="that of your data",
        offline="yes",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.column:
            raise ConfigError("column: name the column, e.g. {scorer: column, column: toxicity}.")

    @property
    def title(self) -> str:
        return self.column

    def score(self, answers: Sequence[Answer], reporter: Reporter | None = None) -> list[float]:
        values = []
        for answer in answers:
            value = answer.columns.get(self.column)
            if value is None:
                near = did_you_mean(self.column, answer.columns) if answer.columns else " The row has no numeric columns."
                raise DataError(
                    f'{answer.origin}: no number in column "{self.column}" (a pair needs one for chosen and one for rejected).{near}'
                )
            if not math.isfinite(value):
                raise DataError(f'{answer.origin}: column "{self.column}" holds {value}. Every completion needs a finite reward.')
            values.append(float(value))
        return values
