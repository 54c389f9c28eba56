"""The executable loss specification: every loss is written once, next to its paper."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from upo.errors import did_you_mean
from upo.losses.auxiliary import Auxiliary
from upo.losses.base import Loss, Scores
from upo.losses.objective import Objective
from upo.losses.pairwise import DPO
from upo.losses.supervised import SFT
from upo.losses.unpaired import KTO

LOSSES: dict[str, type[Loss]] = {loss.name: loss for loss in (DPO, KTO, SFT)}

__all__ = ["DPO", "KTO", "LOSSES", "SFT", "Auxiliary", "Loss", "Objective", "Scores", "build_loss", "loss_options"]


def build_loss(name: str, **options: Any) -> Loss:
    """The loss with these options. Raises ValueError naming an unknown loss or option, or one out of its range."""
    if name not in LOSSES:
        raise ValueError(f'unknown loss "{name}".{did_you_mean(name, LOSSES)}')
    known = loss_options(LOSSES[name])
    for option, value in options.items():
        if option not in known:
            raise ValueError(f'{name} has no option "{option}".{did_you_mean(option, [*known, "weight"])}')
        if isinstance(known[option], float):
            try:
                if isinstance(value, bool):
                    raise TypeError
                options[option] = float(value)
            except (TypeError, ValueError):
                raise ValueError(f"{name}: {option} must be a number (got {value!r})") from None
    return LOSSES[name](**options)


def loss_options(loss: type[Loss]) -> dict[str, Any]:
    """Option names of a loss with their defaults."""
    return {f.name: (None if f.default is MISSING else f.default) for f in fields(loss)}
