"""A run that was killed, wherever that was, and resumed ends as if nothing had happened: bit for bit, on each backend."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from killable import FAILPOINTS, Trainer, lines, same_run, stretches

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the runs are forked from a process that has a framework loaded; Metal does not survive that")

STEPS = 6
OPTIMIZERS = {"adamw": {"name": "adamw", "lr": 1e-3}, "rmsprop": {"name": "rmsprop", "lr": 1e-4}}


@pytest.fixture(scope="module")
def trainer() -> Iterator[Callable[[str], Trainer]]:
    """`trainer(backend)`: its process, started when it is first asked for."""
    started: dict[str, Trainer] = {}

    def get(backend: str) -> Trainer:
        return started.setdefault(backend, None) or started.update({backend: Trainer(backend)}) or started[backend]

    yield get
    for process in started.values():
        process.close()


def rows(count: int, first: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"What is {i} and {i}?", "chosen": "The answer is " + "that " * (i % 4 + 1), "rejected": f"I do not know {i}."} for i in range(first, first + count)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A folder with data, for the runs."""
    folder = tmp_path_factory.mktemp("runs")
    for name, content in (("train", rows(10)), ("held_out", rows(5, 50))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def configure(model: Path, place: Path, backend: str, optimizer: str = "adamw") -> dict:
    """UPO with KTO's partners, value head and cosine schedule; evaluations and checkpoints every second step, a micro-batch for each row."""
    return {
        "model": str(model),
        "backend": backend,
        "device": "cpu",
        "dtype": "float32",
        "data": {"train": str(place / "train.jsonl"), "eval": str(place / "held_out.jsonl")},
        "adapter": {"rank": 4, "alpha": 8},
        "objective": {"preset": "upo", "auxiliary": {"rewards": [{"scorer": "length", "low": 3, "high": 9}], "value": {"fit_steps": 5}}},
        "optimizer": {**OPTIMIZERS[optimizer], "schedule": "cosine", "warmup_steps": 2},
        "train": {
            "steps": STEPS, "batch_size": 4, "micro_batch_tokens": 20, "eval_every": 2, "save_every": 2, "keep_checkpoints": 1, "keep_best": "margin",
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(trainer, place, tiny_llama) -> Callable[[str, str], tuple[Path, float]]:
    """`whole(backend, optimizer)`: the run that nothing happened to, and how long it took."""
    done: dict[tuple[str, str], tuple[Path, float]] = {}

    def get(backend: str, optimizer: str) -> tuple[Path, float]:
        if (backend, optimizer) not in done:
            out = place / f"whole-{backend}-{optimizer}"
            trainer(backend).train(configure(tiny_llama, place, backend, optimizer), out.with_name("first"))  # the first one fills the caches
            answer = trainer(backend).train(configure(tiny_llama, place, backend, optimizer), out)
            assert answer["error"] == "" and [line["step"] for line in lines(out) if "eval" not in line] == list(range(1, STEPS + 1))
            done[backend, optimizer] = out, answer["seconds"]
        return done[backend, optimizer]

    return get


# place -> (which time, the steps that are done when the run goes on; None where there is no folder yet)
PLACES = {
    "before a save": (2, 2),
    "in a save": (2, 2),
    "after a save": (3, 4),
    "in the reference pass": (3, None),
    "in evaluation": (8, 2),  # five micro-batches each time, so this is amidst the one after step 2
    "in the result": (1, 6),
    "in the metrics": (6, 2),  # step 3 is there already, and forgotten
}


def go_on(process: Trainer, config: dict, out: Path, **options) -> dict:
    """What a user would do: resume, or start again where the run has no folder yet."""
    return process.train(config, out, resume=(out / "config.yaml").exists(), **options)


@pytest.mark.parametrize("fail", FAILPOINTS)
def test_killed_at(fail, backend, trainer, whole, place, tiny_llama, tmp_path):
    expected, _ = whole(backend, "adamw")
    out, config, process = tmp_path / "run", configure(tiny_llama, place, backend), trainer(backend)
    nth, done = PLACES[fail]
    cache = str(tmp_path / "cache") if done is None else None  # the reference is in the usual one
    assert process.train(config, out, fail=fail, nth=nth, cache=cache)["signal"] == 9
    assert not (out / "summary.json").exists() and out.exists() == (done is not None)
    answer = go_on(process, config, out, cache=cache)
    assert (answer["signal"], answer["error"]) == (0, "")
    same_run(expected, out)
    assert stretches(out) == ([(0, 6)] if done in (None, 6) else [(0, done), (done, 6)])
    assert [text for text in answer["infos"] if text.startswith("Going on")] == (
        [] if done is None else [f"Going on after step {done} of 6 (1-{done} by {backend} on cpu)."]
    )


def survive(kills: int, seed: int, process: Trainer, config: dict, whole: tuple[Path, float], folder: Path) -> list[tuple[int, int]]:
    """Kill runs at random moments so many times, whether they were just started or resumed, and compare each with the whole one.

    Returns the stretches of all of them.
    """
    expected, seconds = whole
    draw, found, landed, count = random.Random(seed), [], 0, 0
    while landed < kills:
        out = folder / f"run{count}"
        answer = go_on(process, config, out, after=draw.uniform(0, 1.1 * seconds))
        assert answer["error"] == ""
        landed += answer["signal"] == 9
        if (out / "summary.json").exists() or landed == kills:
            if not (out / "summary.json").exists():
                assert go_on(process, config, out)["error"] == ""
            same_run(expected, out)
            ends = stretches(out)
            assert ends[0][0] == 0 and ends[-1][1] == STEPS and all(a[1] == b[0] for a, b in pairwise(ends))
            found += ends
            count += 1
    return found


def test_killed_at_random_moments(backend, trainer, whole, place, tiny_llama, tmp_path):
    config = configure(tiny_llama, place, backend, "rmsprop")
    assert survive(3, 1, trainer(backend), config, whole(backend, "rmsprop"), tmp_path)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(backend, trainer, whole, place, tiny_llama, tmp_path):
    config = configure(tiny_llama, place, backend, "adamw")
    found = survive(20, 2, trainer(backend), config, whole(backend, "adamw"), tmp_path)
    print(backend, found)
    assert len(found) > 1
