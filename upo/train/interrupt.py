"""Ctrl-C: the first one is a request to stop after the current step, the second one stops at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import numpy as np

from upo.backend import Comm
from upo.train.reporter import Reporter


class Interrupt:
    """While the context is open, the first SIGINT is noted and the usual handler restored for the second.

    Outside the main thread, where Python delivers no signals, it notes nothing.
    """

    def __init__(self, reporter: Reporter) -> None:
        self.requested = False
        self._reporter = reporter
        self._previous: Any = None
        self._installed = False

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)
            self._installed = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def agreed(self, comm: Comm) -> bool:
        """Whether any rank was asked to stop: all ranks must leave after the same step."""
        if comm.size == 1:
            return self.requested
        return bool(comm.all_sum(np.array([self.requested], np.float32))[0] > 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        with contextlib.suppress(RuntimeError):  # the signal may have come in the middle of another message
            self._reporter.warn("Stopping after this step; its state will be saved. Ctrl-C again stops at once, without saving.")

    def _restore(self) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._previous)
            self._installed = False
