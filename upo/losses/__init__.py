"""The executable loss specification: every loss is written once, next to its paper."""

from __future__ import annotations

from typing import Any

from upo.errors import did_you_mean
from upo.losses import (
    adaptive,
    anchored,
    batchwise,
    pairwise,
    reference_free,
    references,
    reshaped,
    rewarded,
    supervised,
    unpaired,
    valued,
)
from upo.losses.auxiliary import Auxiliary
from upo.losses.base import Loss, Scores
from upo.losses.objective import Objective, Term
from upo.losses.options import defaults, typed
from upo.losses.pairwise import DPO
from upo.losses.supervised import SFT
from upo.losses.unpaired import KTO

FAMILIES = (pairwise, anchored, reshaped, adaptive, batchwise, references, reference_free, unpaired, rewarded, valued, supervised)
LOSSES: dict[str, type[Loss]] = {
    loss.name: loss
    for family in FAMILIES
    for loss in vars(family).values()
    if isinstance(loss, type) and issubclass(loss, Loss) and loss.__module__ == family.__name__ and hasattr(loss, "name")
}

__all__ = ["DPO", "FAMILIES", "KTO", "LOSSES", "SFT", "Auxiliary", "Loss", "Objective", "Scores", "Term", "build_loss", "loss_options"]


def build_loss(name: str, **options: Any) -> Loss:
    """The loss with these options. Raises ValueError naming an unknown loss or option, or one out of its range."""
    if name not in LOSSES:
        raise ValueError(f'unknown loss "{name}".{did_you_mean(name, LOSSES)}')
    known = defaults(LOSSES[name])
    for option in options:
        if option not in known:
            raise ValueError(f'{name} has no option "{option}".{did_you_mean(option, [*known, "weight", "weight_column"])}')
    return LOSSES[name](**{option: typed(name, option, known[option], value) for option, value in options.items()})


def loss_options(loss: type) -> dict[str, Any]:
    """Option names of a loss with their defaults."""
    return defaults(loss)
