"""How the library speaks while it works: the command line shows it, a script may listen, the default is silent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Reporter(Protocol):
    """Receives progress. Only rank 0 reports."""

    def info(self, text: str) -> None:
        """Something worth a line: what was found, chosen or repaired."""
        ...

    def warn(self, text: str) -> None:
        """Something the user should look at, with the remedy."""
        ...

    def start(self, phase: str, total: int, unit: str) -> None:
        """A phase of known length begins, e.g. ("reference", 400, "rows"). The previous one ends."""
        ...

    def advance(self, done: int) -> None:
        """`done` more units of the phase are finished."""
        ...

    def metrics(self, record: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        ...


class Silent:
    """Says nothing."""

    def info(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def start(self, phase: str, total: int, unit: str) -> None: ...

    def advance(self, done: int) -> None: ...

    def metrics(self, record: Mapping[str, Any]) -> None: ...
