"""Ctrl-C, or a polite end from outside (SIGTERM): the first one is a request to stop after the current step, the second one stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import numpy as np

from upo.backend import Comm
from upo.training.reporter import Reporter

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # the second is what schedulers of clusters send before they kill
FORWARDED = 5.0  # seconds in which a launcher (torchrun, mlx.launch) passes on to its ranks the Ctrl-C that the terminal sent them too


class Interrupt:
    """While the context is open, the first SIGINT or SIGTERM is noted, and the second has its usual effect.

    Outside the main thread, where Python delivers no signals, it notes nothing.
    """

    def __init__(self, reporter: Reporter) -> None:
        self.requested = False
        self._reporter = reporter
        self._previous: dict[signal.Signals, Any] = {}
        self._same_until = 0.0

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def agreed(self, comm: Comm) -> bool:
        """Whether any rank was asked to stop: all ranks must leave after the same step."""
        if comm.size == 1:
            return self.requested
        return bool(comm.all_sum(np.array([self.requested], np.float32))[0] > 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested = True
            launched = any(name in os.environ for name in ("RANK", "MLX_RANK"))
            self._same_until = time.monotonic() + (FORWARDED if launched else 0.0)
            with contextlib.suppress(RuntimeError):  # the signal may have come in the middle of another message
                self._reporter.warn("Stopping after this step; its state will be saved. Ctrl-C again stops at once, without saving.")
        elif time.monotonic() >= self._same_until:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
