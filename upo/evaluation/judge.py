"""Which of two answers is better: judges, asked in both orders, and the win rate that follows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from upo.errors import UpoError
from upo.evaluation.answers import Answers
from upo.evaluation.change import interval
from upo.rewards import Answer, Scorer
from upo.rewards.python import Python
from upo.training.reporter import Reporter

TIE = None
Verdict = int | None  # 0: the first answer is better, 1: the second, None: neither
PATIENCE = 3  # failures in a row after which a judge is not asked any more


class Judge:
    """Compares two answers to a prompt."""

    name: str
    parallel: int = 1  # pairs at once; more than one are judged in threads

    def __call__(self, prompt: str, first: str, second: str) -> Verdict:
        """Raises UpoError if there is no verdict."""
        raise NotImplementedError

    def close(self) -> None:
        """No more pairs; who waits for a verdict gives up."""


@dataclass(frozen=True)
class ScorerJudge(Judge):
    """The answer with the higher score is better. It knows no order, so it is never inconsistent."""

    scorer: Scorer
    reporter: Reporter

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.scorer.title

    def __call__(self, prompt: str, first: str, second: str) -> Verdict:
        a, b = self.scorer.score([Answer("the judge's first answer", prompt, first), Answer("the judge's second answer", prompt, second)], self.reporter)
        return TIE if a == b else int(b > a)


@dataclass(frozen=True)
class PythonJudge(Judge):
    """A function of prompt, first and second answer that returns 0, 1 or None (or "tie"): FILE.py:NAME or MODULE:NAME."""

    function: Callable[[str, str, str], Any]
    name: str
    timeout: float = 60.0  # seconds for a verdict

    @classmethod
    def load(cls, function: str, timeout: float) -> PythonJudge:
        """Raises ConfigError if there is no such function."""
        return cls(Python(function).load(), function.rpartition(":")[2], timeout)

    def __call__(self, prompt: str, first: str, second: str) -> Verdict:
        verdict = self._call(prompt, first, second)
        if verdict is None or (isinstance(verdict, str) and verdict == "tie"):
            return TIE
        if isinstance(verdict, bool) or verdict not in (0, 1):
            raise UpoError(f"judge {self.name}: answered {str(verdict)[:40]!r}; a verdict is 0, 1 or None.")
        return int(verdict)

    def _call(self, *texts: str) -> Any:
        """The function's result. A call that takes too long is left to itself: a thread cannot be stopped."""
        found: dict[str, Any] = {}

        def call() -> None:
            try:
                found["verdict"] = self.function(*texts)
            except BaseException as error:  # whatever the user's code raises is for the user, in one line
                found["error"] = error

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(self.timeout)
        if "error" in found:
            error = found["error"]
            raise UpoError(f"judge {self.name}: raised {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
        if "verdict" not in found:
            raise UpoError(f"judge {self.name}: no verdict within {self.timeout:g} s.")
        return found["verdict"]


@dataclass(frozen=True)
class WinRate:
    """How often the answers after were better than those before; a tie counts one half."""

    judge: str
    mean: float | None  # over prompts; None without a single verdict
    low: float | None
    high: float | None
    wins: int
    losses: int
    ties: int  # the inconsistent ones among them
    inconsistent: int  # the verdict changed with the order
    failed: int  # without a verdict, left out

    def record(self) -> dict[str, Any]:
        return asdict(self)


def win_rate(judge: Judge, prompts: Sequence[str], before: Answers, after: Answers, reporter: Reporter) -> WinRate:
    """Sample by sample, each pair in both orders; a verdict that changes with the order is a tie, and equal answers are one unasked.

    A pair without a verdict is left out; after a few in a row the judge is not asked any more. The interval is a bootstrap over prompts.
    """
    reporter.start(f"judge {judge.name}", sum(map(len, before)), "pairs")
    counts = {"wins": 0, "losses": 0, "ties": 0, "inconsistent": 0, "failed": 0}
    per_prompt = []
    pairs = [[(prompt, *pair) for pair in zip(olds, news, strict=True)] for prompt, olds, news in zip(prompts, before, after, strict=True)]
    with closing(_verdicts(judge, [pair for of_prompt in pairs for pair in of_prompt])) as outcomes:
        for of_prompt in pairs:
            credits = []
            for _, verdicts in zip(of_prompt, outcomes, strict=False):  # in this order, so that no outcome is taken too many
                reporter.advance(1)
                if isinstance(verdicts, UpoError):
                    reporter.warn(f"{verdicts} Such pairs are left out of the win rate.")
                    counts["failed"] += 1
                    continue
                outcome = {(1, 0): "wins", (0, 1): "losses"}.get(verdicts, "ties")  # type: ignore[arg-type]
                counts[outcome] += 1
                counts["inconsistent"] += verdicts in ((0, 0), (1, 1))
                credits.append({"wins": 1.0, "losses": 0.0, "ties": 0.5}[outcome])
            if credits:
                per_prompt.append(float(np.mean(credits)))
    found = asdict(interval(np.array(per_prompt))) if per_prompt else {"mean": None, "low": None, "high": None}
    return WinRate(judge.name, **found, **counts)


def _verdicts(judge: Judge, pairs: Sequence[tuple[str, str, str]]) -> Generator[tuple[Verdict, Verdict] | UpoError, None, None]:
    """Of each pair in turn the verdicts in both orders, or why there are none."""

    def ask(pair: tuple[str, str, str]) -> tuple[Verdict, Verdict] | UpoError:
        prompt, old, new = pair
        try:
            return (TIE, TIE) if old == new else (judge(prompt, old, new), judge(prompt, new, old))
        except UpoError as error:
            return error

    pool = ThreadPoolExecutor(judge.parallel) if judge.parallel > 1 else None
    outcomes = pool.map(ask, pairs) if pool else map(ask, pairs)
    failed = 0  # in a row
    try:
        for _ in pairs:
            if failed == PATIENCE:
                yield UpoError(f"judge {judge.name}: failed {PATIENCE} times in a row and is not asked any more.")
                continue
            outcome = next(outcomes)
            failed = failed + 1 if isinstance(outcome, UpoError) else 0
            yield outcome
    finally:
        judge.close()
        if pool:
            pool.shutdown(wait=False, cancel_futures=True)
