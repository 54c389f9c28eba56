"""`upo train --resume` on a real, tiny model: what is said, what is refused in one line, and what a full disk leaves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from killable import lines
from upo_cli.main import main

PAIRS = [{"prompt": f"What is {i} and {i}?", "chosen": f"The answer is {2 * i}.", "rejected": f"I do not know {i}."} for i in range(1, 9)]


@pytest.fixture
def config(tmp_path, monkeypatch, tiny_llama):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "MLX_RANK"):
        monkeypatch.delenv(name, raising=False)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    Path("run.yaml").write_text(
        f"model: {tiny_llama}\ndevice: cpu\ndtype: float32\ndata: {{train: pairs.jsonl}}\nadapter: {{rank: 4}}\n"
        "optimizer: {schedule: constant, warmup_steps: 0}\ntrain: {batch_size: 2, steps: 2, save_every: 1}\n"
    )
    return "run.yaml"


def upo(*arguments: str):
    return CliRunner().invoke(main, ["train", *arguments], catch_exceptions=False)


def refused(*arguments: str) -> str:
    """The one line of an error."""
    result = upo(*arguments)
    assert result.exit_code == 1 and result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and "Traceback" not in result.stderr
    return last


RUN = ("--resume", "--out", "runs/run")


def test_going_on(config, backend):
    assert upo(config, "--backend", backend).exit_code == 0
    assert "the run in runs/run is finished" in refused(*RUN)
    result = upo(*RUN, "--set", "train.steps=4")
    assert result.exit_code == 0, result.stderr
    assert f"Going on after step 2 of 4 (1-2 by {backend} on cpu)." in result.stderr and "step 4/4" in result.stderr
    assert [line["step"] for line in lines(Path("runs/run"))] == [1, 2, 3, 4]
    assert upo("run.yaml", "--backend", backend, "--out", "runs/whole", "--set", "train.steps=4").exit_code == 0
    result = (Path(run) / "adapter" / "adapter_model.safetensors" for run in ("runs/run", "runs/whole"))
    assert next(result).read_bytes() == next(result).read_bytes()


def test_refusals(config):
    assert upo(config, "--backend", "torch").exit_code == 0
    longer = (*RUN, "--set", "train.steps=4")
    assert "optimizer.lr: 0.0002 in the run, 0.1 now" in refused(*longer, "--set", "optimizer.lr=0.1")
    assert upo(*longer, "--set", "optimizer.lr=0.1", "--reschedule", "--dry-run").exit_code == 0
    usage = upo(config, "--reschedule")
    assert usage.exit_code == 2 and "--reschedule changes a run that is resumed: add --resume." in usage.stderr
    text = Path("pairs.jsonl").read_text()
    Path("pairs.jsonl").write_text(text.replace("I do not know 3", "I do not know"))
    assert "(data.train: 1 of 8 rows, from pairs.jsonl:3 on)" in refused(*longer)
    Path("pairs.jsonl").write_text(text)
    for step in ("step-000001", "step-000002"):
        path = Path("runs/run/checkpoints") / step / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-8])
    assert re.search(r"no checkpoint is complete\. .*step-000002: adapter_model\.safetensors is damaged", refused(*longer))


@pytest.mark.skipif(sys.platform != "linux", reason="uses a limit of the file size as Linux has it")
def test_a_full_disk(config):
    """Files of at most 48 KiB: the adapter fits, its optimizer does not."""
    assert upo(config, "--backend", "torch").exit_code == 0
    before = {p: p.read_bytes() for p in Path("runs/run/checkpoints").rglob("*") if p.is_file()}
    command = f"ulimit -f 48; exec {sys.executable} -m upo_cli train --resume --out runs/run --set train.steps=3"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=dict(os.environ), timeout=120)
    assert result.returncode == 1 and result.stdout == "" and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == (
        "Error: runs/run/checkpoints/step-000003: cannot be written (File too large). The one of step 2 is untouched. "
        "Make room, then go on: upo train --resume --out runs/run"
    )
    assert {p: p.read_bytes() for p in Path("runs/run/checkpoints").rglob("*") if p.is_file()} == before
    assert upo(*RUN).exit_code == 0 and json.loads(Path("runs/run/summary.json").read_text())["steps"] == 3
