"""What a person sees while the library works: a live bar on a terminal, plain lines elsewhere. All on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from upo.training.reporter import Reporter, Silent
from upo_cli.options import rank

# metric, label, format: the few numbers worth a glance; all of them are in metrics.jsonl
_SHOWN = (
    ("loss", "loss", ".4f"),
    ("accuracy", "accuracy", ".2f"),
    ("margin", "margin", ".3f"),
    ("goals", "goals", ".3f"),
    ("reward/mean", "reward", ".3f"),
    ("weight/mean", "weight", ".2f"),
    ("lr", "lr", ".1e"),
    ("rows_per_s", "rows/s", ".1f"),
)


class _Warnings:
    """Each warning once, and those that have scrolled away once more at the end."""

    def __init__(self, quiet: bool, far: int = 10) -> None:
        self.quiet, self.far = quiet, far  # lines after which a warning is out of sight
        self.lines = 0
        self._given: dict[str, int] = {}  # warning: the number of its line

    def is_new(self, text: str) -> bool:
        """Whether this warning has not been given yet; from now on it has."""
        new = text not in self._given
        self._given.setdefault(text, self.lines)
        return new

    def to_repeat(self) -> list[str]:
        """Lines to end with, if any."""
        distant = [f"  - {text}" for text, at in self._given.items() if self.lines - at > self.far]
        return ["Warnings of this run:", *distant] if distant and not self.quiet else []


class PlainReporter:
    """One line per message and phase, and one for every `every_steps` steps or `every_seconds` seconds, whichever comes first."""

    def __init__(
        self, stream: TextIO, quiet: bool = False, every_steps: int = 10, every_seconds: float = 15.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.stream, self.quiet, self.clock = stream, quiet, clock
        self.every_steps, self.every_seconds = every_steps, every_seconds
        self.warnings = _Warnings(quiet)
        self.phase, self.total, self.unit, self.done = "", 0, "", 0
        self.began = self.spoke = clock()
        self.record: Mapping[str, Any] | None = None  # the last training record, while it is not shown

    def info(self, text: str) -> None:
        if not self.quiet:
            self._write(text)

    def warn(self, text: str) -> None:
        if self.warnings.is_new(text):
            self._write(f"Warning: {text}")

    def start(self, phase: str, total: int, unit: str) -> None:
        self.close_phase()
        self.phase, self.total, self.unit, self.done = phase, total, unit, 0
        self.began = self.spoke = self.clock()
        self.info(f"{phase}: {total} {unit}")

    def advance(self, done: int) -> None:
        self.done += done
        stepped = self.record is not None and (self.done in (1, self.total) or self.done % self.every_steps == 0)
        if stepped or (self.clock() - self.spoke >= self.every_seconds and self.done < self.total):
            self._say()

    def metrics(self, record: Mapping[str, Any]) -> None:
        if record.get("eval"):
            self.info(line(record))
        else:
            self.record = record

    def close_phase(self) -> None:
        """Shows the phase's last record, if it was not due."""
        if self.record is not None:
            self._say()

    def close(self) -> None:
        self.close_phase()
        for text in self.warnings.to_repeat():
            self._write(text)

    def _say(self) -> None:
        self.spoke = self.clock()
        remaining = self.total - self.done
        left = (self.spoke - self.began) / self.done * remaining if self.done else 0.0
        if self.record is None:
            text = f"{self.phase}: {self.done}/{self.total} {self.unit}"
        else:
            text = line(self.record, self.record.get("step", 0) + remaining)  # of a resumed run the phase is the rest
        self.record = None
        self.info(text + (f"  {duration(left)} left" if 0 < left else ""))

    def _write(self, text: str) -> None:
        self.warnings.lines += 1
        print(text, file=self.stream, flush=True)


class RichReporter:
    """A live bar for the phase at hand, with time left and the newest numbers below it; messages scroll above.

    Between phases nothing is live: other libraries draw bars of their own while models are fetched and loaded.
    """

    def __init__(self, quiet: bool = False, console: Any = None) -> None:
        from rich.console import Console

        self.quiet, self.warnings = quiet, _Warnings(quiet)
        self.console = console or Console(stderr=True, highlight=False)
        self.live: Any = None
        self.progress: Any = None
        self.status = ""  # the newest numbers

    def info(self, text: str) -> None:
        if not self.quiet:
            self._print(text, "")

    def warn(self, text: str) -> None:
        if self.warnings.is_new(text):
            self._print(f"Warning: {text}", "yellow")

    def start(self, phase: str, total: int, unit: str) -> None:
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        if self.quiet:
            return
        self._end_phase()
        columns = (TextColumn(f"{phase:<18}", markup=False), BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn(unit, markup=False))
        self.progress = Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self.console)
        self.progress.add_task(phase, total=total)
        self.live = Live(console=self.console, get_renderable=self._render, refresh_per_second=8)
        self.live.start()

    def advance(self, done: int) -> None:
        if self.live is not None:
            self.progress.advance(self.progress.task_ids[0], done)
            if self.progress.finished:
                self._end_phase()

    def metrics(self, record: Mapping[str, Any]) -> None:
        if record.get("eval"):
            self.info(line(record))
        else:
            self.status = line(record)

    def close(self) -> None:
        self._end_phase()
        for text in self.warnings.to_repeat():
            self._print(text, "yellow")

    def _end_phase(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.warnings.lines += 1
        self.live, self.status = None, ""

    def _print(self, text: str, style: str) -> None:
        from rich.text import Text

        self.warnings.lines += 1
        self.console.print(Text(text, style=style))

    def _render(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        return Group(self.progress, Text(self.status, style="cyan")) if self.status else self.progress


def line(record: Mapping[str, Any], total: int | None = None) -> str:
    """A record of metrics.jsonl in a line: `step 10/100  loss 0.6931  accuracy 0.50 ...`."""
    parts = [f"step {record.get('step', 0)}" + (f"/{total}" if total else "")] + (["evaluation"] if record.get("eval") else [])
    parts += [f"{label} {number(record[name], spec)}" for name, label, spec in _SHOWN if isinstance(record.get(name), (int, float))]
    return "  ".join(parts)


def number(value: float, spec: str) -> str:
    """The number in this format, without the minus sign of a zero."""
    text = format(value, spec)
    return text.removeprefix("-") if float(text) == 0 else text


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@contextmanager
def reporting(quiet: bool = False) -> Iterator[Reporter]:
    """The reporter for this process: silent on ranks other than 0, live on a terminal, else plain lines; closed at the end."""
    if rank():
        yield Silent()
        return
    reporter: PlainReporter | RichReporter = RichReporter(quiet) if sys.stderr.isatty() else PlainReporter(sys.stderr, quiet)
    try:
        yield reporter
    finally:
        reporter.close()
