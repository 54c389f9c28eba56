"""Errors a user can act on. Each message says what, where and the remedy; the command line shows it without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UpoError(Exception):
    """Base of every error that is the input's fault and not the program's. Exit code 1."""


class ConfigError(UpoError):
    """A configuration value that cannot be used; the message starts with the key, e.g. `optimizer.lr: ...`."""


class DataError(UpoError):
    """A data file or row that cannot be used; the message starts with `file:line:`."""


class ModelError(UpoError):
    """A model, tokenizer or adapter that cannot be loaded or is refused."""


class BackendError(UpoError):
    """A backend that is missing, or that cannot do what was asked; the message names the alternative."""


class RunError(UpoError):
    """A run folder that exists, is incomplete, or does not fit what was asked."""


class NonFiniteError(UpoError):
    """A loss or gradient that is not a number. Raised before the weights are touched; names the step and the rows."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean "beta"?` for the nearest known word, or a list of what there is."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f' Did you mean "{near[0]}"?' if near else f" Known: {', '.join(known)}."
