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


class WarningsOnly(Silent):
    """Passes warnings on, and nothing else: for work inside a phase, which another one would end."""

    def __init__(self, inner: Reporter) -> None:
        self.inner = inner

    def warn(self, text: str) -> None:
        self.inner.warn(text)


class Recorder:
    """Passes everything on and keeps the warnings, each once."""

    def __init__(self, inner: Reporter) -> None:
        self.inner = inner
        self.warnings: list[str] = []

    def info(self, text: str) -> None:
        self.inner.info(text)

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
            self.inner.warn(text)

    def start(self, phase: str, total: int, unit: str) -> None:
        self.inner.start(phase, total, unit)

    def advance(self, done: int) -> None:
        self.inner.advance(done)

    def metrics(self, record: Mapping[str, Any]) -> None:
        self.inner.metrics(record)
