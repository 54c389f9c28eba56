"""Processes that score batches: several at once, and each can be ended when a scorer hangs or crashes."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from upo import errors
from upo.errors import DataError, UpoError
from upo.rewards.scoring import checked

if TYPE_CHECKING:
    from upo.rewards.base import Answer, TextScorer

WORTH_IT = 4096  # answers; to start processes takes about as long as to score so many with a plain formula
START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from upo.rewards.workers import serve; serve()"


def cores() -> int:
    """Processes worth having: one per core that this process may use, at most 8."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, available)


@contextmanager
def workers(scorer: TextScorer, number: int) -> Iterator[Callable[[Sequence[Answer]], Any]]:
    """A function that scores a batch in one of `number` processes; call it from as many threads. All are ended on leaving."""
    everyone = [Worker(scorer) for _ in range(number)]
    free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for worker in everyone:
        free.put(worker)

    def score(batch: Sequence[Answer]) -> Any:
        worker = free.get()
        try:
            return worker.score(batch)
        finally:
            free.put(worker)

    try:
        yield score
    finally:
        for worker in everyone:
            worker.stop()


class Worker:
    """One process with a scorer of its own, started when first asked and again after it was ended."""

    def __init__(self, scorer: TextScorer) -> None:
        self.scorer = scorer
        self.limit = float(getattr(scorer, "limit", 0.0)) or None  # seconds for a batch
        self.process: subprocess.Popen[str] | None = None
        self.end = ""

    def score(self, batch: Sequence[Answer]) -> Any:
        """What the scorer returns. Raises DataError naming the answer at which it hangs or crashes."""
        reply = self._ask(batch)
        if reply is not None:
            return reply["scores"]
        singles = []
        for answer in batch:  # one of them is the one
            reply = self._ask([answer])
            if reply is None:
                raise DataError(f"{answer.origin}: scorer {self.scorer.title} {self.end}.")
            singles += checked(self.scorer.title, reply["scores"], [answer])
        return singles

    def _ask(self, batch: Sequence[Answer]) -> dict[str, Any] | None:
        """None if the process ended or was ended; `end` then says how."""
        process = self.process = self.process or self._start()
        late = threading.Event()

        def give_up() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self.limit, give_up) if self.limit else None
        fields = [asdict(replace(answer, columns={})) for answer in batch]
        try:
            if timer:
                timer.start()
            line = _exchange(process, json.dumps({"answers": fields, "limit": self.limit}))
        finally:
            if timer:
                timer.cancel()
        if line.endswith("\n"):  # else it ended in the middle of it
            reply = json.loads(line)
            if "error" in reply:
                raise getattr(errors, reply["kind"])(reply["error"])
            return reply
        self.stop()
        code = process.returncode
        self.end = (
            f"took longer than {self.limit:g} s and was stopped. Raise its option `limit`, or look at this text"
            if late.is_set() or code == -signal.SIGALRM
            else f"ended its process ({_signal_name(-code) if code < 0 else f'exit code {code}'}) at this text"
        )
        return None

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", START, json.dumps(sys.path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", start_new_session=True,
        )  # fmt: skip
        ready = _exchange(process, json.dumps({"scorer": self.scorer.name, "options": asdict(self.scorer)}))
        if not ready:
            process.kill()
            raise UpoError(f"scorer {self.scorer.title}: its process could not be started (exit code {process.wait()}); see above.")
        reply = json.loads(ready)
        if "error" in reply:
            process.kill()
            process.wait()
            raise getattr(errors, reply["kind"])(reply["error"])
        return process

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except OSError:  # what was not yet sent
                        pass


def _exchange(process: subprocess.Popen[str], line: str) -> str:
    """Send a line and wait for one; empty if the process has ended."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
        return process.stdout.readline()
    except OSError:
        return ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def serve() -> None:
    """The process: a scorer's name and options, then batch after batch, one line of JSON each."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a function prints must not look like an answer
    for line in sys.stdin:
        reply = _reply(json.loads(line))
        out.write(json.dumps(reply, default=_plain) + "\n")
        out.flush()


_scorer: list[TextScorer] = []


def _reply(request: dict[str, Any]) -> dict[str, Any]:
    from upo.rewards import build_scorer
    from upo.rewards.base import Answer, TextScorer

    try:
        if "scorer" in request:
            scorer = build_scorer(request["scorer"], allow_code=True, **request["options"])  # it was allowed where the process was started
            assert isinstance(scorer, TextScorer)
            _scorer[:] = [scorer]
            return {"ready": True}
        if request["limit"]:  # should the one who started this process be gone
            signal.setitimer(signal.ITIMER_REAL, 2 * request["limit"] + 1)
        scores = _scorer[0]([Answer(**fields) for fields in request["answers"]])
        signal.setitimer(signal.ITIMER_REAL, 0)
        return {"scores": scores}
    except UpoError as error:
        return {"error": str(error), "kind": type(error).__name__}


def _plain(value: Any) -> Any:
    """Arrays and other sequences as lists; anything else as text, which is refused as a score."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if hasattr(value, "__iter__") else repr(value)
