"""How scorers are run: in batches, in parallel, stopped when they hang, and going on where they were."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from upo.errors import DataError, UpoError
from upo.rewards import Answer, Card, TextScorer, build_scorer, workers
from upo.rewards.base import Ready
from upo.rewards.cache import RewardCache
from upo.training.reporter import Silent


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPO_CACHE", str(tmp_path / "cache"))


class Listener(Silent):
    def __init__(self) -> None:
        self.warned: list[str] = []
        self.said: list[str] = []
        self.done: list[int] = []
        self.phases: list[tuple[str, int]] = []

    def info(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)

    def start(self, phase: str, total: int, unit: str) -> None:
        self.phases.append((phase, total))

    def advance(self, done: int) -> None:
        self.done.append(done)


def answers(*texts: str) -> list[Answer]:
    return [Answer(f"d.jsonl:{i}", "prompt", text) for i, text in enumerate(texts, 1)]


@dataclass(frozen=True)
class Fake(TextScorer):
    """Length of the text; what starts with `bad` raises."""

    name: ClassVar[str] = "fake"
    version: ClassVar[str] = "1"
    card: ClassVar[Card] = Card("A fake.", None, "longer", "fast", "none", "yes")
    batch: ClassVar[int] = 2
    asked: ClassVar[list[str]] = []

    def __call__(self, answers: Sequence[Answer]) -> Sequence[float]:
        self.asked.extend(a.text for a in answers)
        if any(a.text.startswith("bad") for a in answers):
            raise UpoError("scorer fake: no.")
        return [float(len(a.text)) for a in answers]


@pytest.fixture
def fake() -> Fake:
    Fake.asked.clear()
    return Fake()


def test_progress_counts_distinct_answers(fake: Fake) -> None:
    listener = Listener()
    fake.score(answers("a", "b", "c", "a", "d", "e"), listener)
    assert listener.phases == [("score fake", 5)] and listener.done == [2, 2, 1]


def test_what_was_scored_before_a_failure_is_kept_and_not_scored_again(fake: Fake) -> None:
    with pytest.raises(UpoError, match=r"scorer fake: no\. 2 of 5 scores are kept; the same command goes on from there\.$"):
        fake.score(answers("a", "bb", "bad", "ccc", "d"))
    assert Fake.asked == ["a", "bb", "bad", "ccc"]
    Fake.asked.clear()
    assert fake.score(answers("a", "bb", "ccc", "d")) == [1.0, 2.0, 3.0, 1.0] and Fake.asked == ["ccc", "d"]


@dataclass(frozen=True)
class Threaded(Fake):
    """Its batches are done at once, or not at all."""

    name: ClassVar[str] = "threaded"
    barrier: ClassVar[threading.Barrier] = threading.Barrier(3)

    def ready(self, count: int, reporter: Any) -> Any:
        from contextlib import nullcontext

        return nullcontext(Ready(self, 3))

    def __call__(self, answers: Sequence[Answer]) -> Sequence[float]:
        self.barrier.wait(timeout=30)
        return super().__call__(answers)


def test_batches_run_in_parallel_and_come_back_in_place(fake: Fake) -> None:
    assert Threaded().score(answers("a", "bb", "ccc", "dddd", "eeeee", "ffffff")) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_a_failure_in_parallel_keeps_what_its_neighbours_find(fake: Fake) -> None:
    with pytest.raises(UpoError, match=r"4 of 6 scores are kept"):
        Threaded().score(answers("a", "bb", "bad", "x", "eeeee", "ffffff"))
    Fake.asked.clear()
    assert Threaded().score(answers("a", "bb", "eeeee", "ffffff")) == [1.0, 2.0, 5.0, 6.0] and Fake.asked == []


def test_many_answers_go_to_several_processes_with_the_same_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts = [f"{'w ' * (n % 130)} x{n}" for n in range(300)]
    alone = build_scorer("length").score(answers(*texts))
    monkeypatch.setenv("UPO_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr("upo.rewards.base.WORTH_IT", 300)
    monkeypatch.setattr("upo.rewards.base.cores", lambda: 3)
    monkeypatch.setattr("upo.rewards.length.Length.batch", 50)
    started: list[int] = []
    start = workers.Worker._start

    def counted(worker: workers.Worker) -> Any:
        process = start(worker)
        started.append(process.pid)
        return process

    monkeypatch.setattr(workers.Worker, "_start", counted)
    assert build_scorer("length").score(answers(*texts)) == alone
    assert len(started) == 3 and len(set(alone)) > 50
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


# --- Functions of one's own -------------------------------------------------------------------------------------------------------


@pytest.fixture
def code(tmp_path: Path):
    """`code(body)`: a python scorer whose function `f(prompts, completions)` has this body."""
    count = iter(range(100))

    def write(body: str, **options: Any) -> TextScorer:
        path = tmp_path / f"mine{next(count)}.py"
        path.write_text(f"import os, time, random\nstate = []\ndef f(prompts, completions):\n    {body}\n")
        scorer = build_scorer("python", True, function=f"{path}:f", **options)
        assert isinstance(scorer, TextScorer)
        return scorer

    return write


def test_a_function_that_hangs_is_stopped_and_the_row_named(code) -> None:
    with pytest.raises(DataError, match=r"d\.jsonl:2: scorer f took longer than 0\.5 s and was stopped\. Raise its option `limit`"):
        code("return [time.sleep(1000 if c == 'slow' else 0) or 1.0 for c in completions]", limit=0.5).score(answers("a", "slow", "b"))


def test_a_function_that_is_only_slow_is_asked_one_by_one(code) -> None:
    scorer = code("time.sleep(0.4 * len(completions)); return [float(len(c)) for c in completions]", limit=1.0)
    assert scorer.score(answers("a", "bb", "ccc")) == [1.0, 2.0, 3.0]


def test_a_function_that_ends_its_process(code) -> None:
    with pytest.raises(DataError, match=r"d\.jsonl:2: scorer f ended its process \(exit code 7\) at this text"):
        code("return [os._exit(7) if c == 'x' else 1.0 for c in completions]").score(answers("a", "x"))
    with pytest.raises(DataError, match=r"d\.jsonl:1: scorer f ended its process \(SIGSEGV\)"):
        code("os.kill(os.getpid(), 11)").score(answers("a"))


def test_what_a_function_prints_is_no_answer(code, capfd: pytest.CaptureFixture[str]) -> None:
    assert code("print('hello'); return [1.0] * len(completions)").score(answers("a")) == [1.0]
    assert "hello" in capfd.readouterr().err


@pytest.mark.parametrize("body", ["return [random.random() for c in completions]", "return [1.0 / len(completions) for c in completions]"])
def test_scores_that_change_from_call_to_call_are_told(code, body: str) -> None:
    listener = Listener()
    code(body).score(answers("a", "b", "c"), listener)
    (warning,) = listener.warned
    assert "Scorer f gives the same answer different scores (d.jsonl:1: " in warning and "3 of 3 asked again" in warning


def test_a_steady_function_is_not_warned_about(code) -> None:
    listener = Listener()
    code("return [float(len(c)) for c in completions]").score(answers("a", "b", "c"), listener)
    assert listener.warned == []


def test_remembered_functions(code, tmp_path: Path) -> None:
    log = tmp_path / "log"
    body = f"open({str(log)!r}, 'a').write(''.join(c + '\\n' for c in completions)); return [float(len(c)) for c in completions]"
    scorer = code(body, remember="1")
    assert scorer.score(answers("a", "bb")) == [1.0, 2.0]
    log.unlink()
    assert scorer.score(answers("a", "bb")) == [1.0, 2.0] and not log.exists()


def test_entry_points(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "packages"
    (package / "mine-1.dist-info").mkdir(parents=True)
    (package / "mine-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (package / "mine-1.dist-info" / "entry_points.txt").write_text("[upo.scorers]\nshout = mine_scorers:shout\n")
    (package / "mine_scorers.py").write_text("def shout(prompts, completions):\n    return [float(c.isupper()) for c in completions]\n")
    monkeypatch.syspath_prepend(str(package))
    scorer = build_scorer("python", True, function="shout")
    assert scorer.title == "shout" and scorer.score(answers("HEY", "hey")) == [1.0, 0.0]
    with pytest.raises(UpoError, match=r'no entry point "shoot"\. Did you mean "shout"\?'):
        build_scorer("python", True, function="shoot")


# --- Killed and gone on -----------------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """The process is killed outright while it scores its second batch of 64; the next run scores the rest, the one after it nothing."""
    rows = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"poor {i}"} for i in range(100)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text(
        "import os, pathlib, signal\n"
        "def f(prompts, completions):\n"
        "    log = pathlib.Path('log')\n"
        "    if log.exists() and not os.path.exists('go on'):\n"
        "        os.kill(os.getppid(), signal.SIGKILL)\n"
        "    with log.open('a') as file:\n"
        "        file.writelines(c + '\\n' for c in completions)\n"
        "    return [float(c[-1]) for c in completions]\n"
    )
    command = [sys.executable, "-m", "upo_cli", "score", "d.jsonl", "--reward", "python:function=mine.py:f,remember=1", "--allow-code", "--out", "o.jsonl"]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)

    def asked() -> list[str]:
        return (tmp_path / "log").read_text().splitlines()

    assert run().returncode == -signal.SIGKILL
    first = asked()
    assert len(first) >= 64 and not (tmp_path / "o.jsonl").exists()
    (tmp_path / "go on").touch()
    (tmp_path / "log").write_text("")
    done = run()
    assert done.returncode == 0, done.stderr
    assert not set(first[:64]) & set(asked()), "what was scored before is not scored again"
    assert len(set(asked())) == 200 - 64
    (tmp_path / "log").write_text("")
    (tmp_path / "o.jsonl").unlink()
    assert run().returncode == 0 and asked() == []
    scored = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [(row["f_chosen"], row["f_rejected"]) for row in scored] == [(i % 10, i % 10) for i in range(100)]


def test_of_two_processes_one_scores(fake: Fake, tmp_path: Path) -> None:
    """The second waits for the first and then finds everything there."""
    cache = RewardCache("fake", fake.identity(), Silent())
    listener, found = Listener(), []
    thread = threading.Thread(target=lambda: found.extend(fake.score(answers("a", "bb"), listener)))
    with cache.alone():
        thread.start()
        while not listener.said:
            thread.join(0.01)
        assert "Waiting for another process" in listener.said[0]
        cache.write({fake.digest(answers("a")[0]): 7.0, fake.digest(answers("bb")[0]): 8.0})
    thread.join(30)
    assert found == [7.0, 8.0] and Fake.asked == []
