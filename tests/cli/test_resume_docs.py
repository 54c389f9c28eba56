"""docs/moving-runs.md, tried as written: two folders are the two machines, and `scp` copies between them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from interpreters import need_backend
from killable import lines, stretches

PAGE = Path(__file__).parents[2] / "docs" / "moving-runs.md"
BLOCK = re.compile(r"(?P<before>[^\n]*)\n\n```sh\n(?P<commands>.*?)```", re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """(machine, command) in the order of the page; a block without a machine named before it is on the one before."""
    found, machine = [], "laptop"
    for block in BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        named = re.match(r"On the (laptop|cluster)", block["before"])
        machine = named[1] if named else machine
        found += [(machine, line) for line in block["commands"].splitlines()]
    return found


def test_the_page_is_read_whole():
    """The test below tries every shell command of the page."""
    found = commands()
    assert len(found) == 14 and PAGE.read_text(encoding="utf-8").count("```sh") == 6
    assert [machine for machine, command in found if "upo" in command and "train" in command] == ["laptop", *["cluster"] * 3, "laptop", "laptop"]


def execute(command: str, folder: Path, environment: dict[str, str]) -> str:
    """Run one line in a shell of its own; where it says Ctrl-C, press it after some steps. Returns what came on stderr."""
    log = folder / "stderr.txt"
    with log.open("w") as file:
        process = subprocess.Popen(["bash", "-c", command], cwd=folder, env=environment, stderr=file, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        if command.endswith("# Ctrl-C"):
            deadline = time.monotonic() + 120
            while not re.search(r"^step \d+/", log.read_text(), re.MULTILINE):
                assert process.poll() is None and time.monotonic() < deadline, f"{command}\n{log.read_text()}"
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the command
        code = process.wait(180)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    said = log.read_text()
    if command.endswith("# Ctrl-C"):
        assert code != 0 and "Stopped after step" in said and "is saved" in said, f"{command}\n{said}"
    else:
        assert code == 0, f"{command}\n{said}"
    return said


@pytest.mark.slow
def test_as_written(tmp_path, tiny_llama):
    for backend in ("torch", "mlx"):
        need_backend(backend)
    tools = tmp_path / "bin"
    machines = {name: tmp_path / name for name in ("laptop", "cluster")}
    for folder in (tools, *machines.values()):
        folder.mkdir()
    (tools / "scp").write_text(f'#!/bin/sh\ncase "$1" in cluster:*) cp "{machines["cluster"]}/${{1#cluster:}}" "$2";; *) cp "$1" "{machines["cluster"]}/${{2#cluster:}}";; esac\n')
    (tools / "scp").chmod(0o755)
    rows = [{"prompt": f"What is {i} and {i}?", "chosen": "The answer is " + "that " * (i % 5 + 1), "rejected": f"I do not know {i}."} for i in range(400)]
    (machines["laptop"] / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (machines["laptop"] / "run.yaml").write_text(
        f"model: {tiny_llama}\ndevice: cpu\ndtype: float32\ndata: {{train: preferences.jsonl, eval: 0.05}}\nadapter: {{rank: 4}}\n"
        "objective: {preset: upo, auxiliary: {rewards: [{scorer: length, low: 3, high: 9}], value: {fit_steps: 2}}}\n"
        "train: {batch_size: 4}\n"
    )
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for name in ("RANK", "MLX_RANK"):
        environment.pop(name, None)
    said = []
    for machine, command in commands():
        said.append(execute(command, machines[machine], environment | {"UPO_CACHE": str(tmp_path / f"cache-{machine}")}))

    run = machines["laptop"] / "runs" / "plain"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == len([line for line in lines(run) if "eval" not in line]) and summary["rows"] > 700
    assert [line["step"] for line in lines(run) if "eval" not in line] == list(range(1, summary["steps"] + 1))
    sessions = json.loads((run / "manifest.json").read_text())["sessions"]
    assert [(s["backend"], s["ranks"]) for s in sessions] == [("mlx", 1), ("torch", 1), ("torch", 1), ("torch", 2), ("mlx", 1), ("mlx", 1)]
    ends = stretches(run)
    assert len(ends) == 6 and all(first == before for (first, _), (_, before) in zip(ends[1:], ends, strict=False))
    moved = [re.findall(r"largest difference to the earlier ones (\S+) nats", text) for text in said]
    assert sum(map(bool, moved)) >= 2 and all(float(value) < 1e-3 for values in moved for value in values)
