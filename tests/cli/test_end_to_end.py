"""The commands on a real, tiny model: plan, train, go on, generate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from upo_cli.main import main

PAIRS = [{"prompt": f"What is {i} and {i}?", "chosen": f"The answer is {2 * i}.", "rejected": f"I do not know {i}."} for i in range(1, 9)]


@pytest.fixture
def config(tmp_path, monkeypatch, tiny_llama):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "MLX_RANK"):
        monkeypatch.delenv(name, raising=False)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    Path("run.yaml").write_text(
        f"model: {tiny_llama}\ndevice: cpu\ndtype: float32\ndata: {{train: pairs.jsonl, eval: 0.25}}\nadapter: {{rank: 2}}\n"
        "objective: {preset: upo, auxiliary: {rewards: [{scorer: length, low: 3, high: 9}], value: {fit_steps: 2}}}\n"
        "optimizer: {warmup_steps: 0}\ntrain: {batch_size: 2, steps: 3, save_every: 1, keep_checkpoints: 3}\n"
    )
    return "run.yaml"


def upo(*arguments: str, **options):
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False, **options)


def test_plan_train_and_generate(config, backend):
    plan = json.loads(upo("train", config, "--backend", backend, "--dry-run", "--json").stdout)
    assert plan["steps"] == 3 and plan["rows"]["read"] == 8 and plan["rows"]["dropped"] == 0
    assert not Path("runs").exists()
    result = upo("train", config, "--backend", backend, "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["steps"], summary["rows"]) == (3, 6)
    assert summary["eval"]["before"]["step"] == 0 and summary["eval"]["after"]["step"] == 3
    assert "step 3/3  loss" in result.stderr and "evaluation" in result.stderr
    again = upo("train", config, "--backend", backend)
    assert again.exit_code == 1 and "Error: --out runs/run: holds a run already" in again.stderr and again.stdout == ""
    answer = upo("generate", "runs/run", "--prompt", "What is 2 and 2?", "--max-tokens", "4", "--json", "-q")
    assert answer.exit_code == 0, answer.stderr
    assert json.loads(answer.stdout)["prompt"] == "What is 2 and 2?" and json.loads(answer.stdout)["tokens"] <= 4


def test_faults_of_the_data_are_one_line(config, backend):
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": \n')
    result = upo("train", config, "--backend", backend)
    assert result.exit_code == 1 and result.stdout == "" and not Path("runs").exists()
    assert "Error: pairs.jsonl:2: " in result.stderr.splitlines()[-1]
