"""`upo sweep` on a tiny model: the table, exit codes, and a second call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from upo_cli.main import main

PAIRS = [{"prompt": f"What is {i} and {i}?", "chosen": f"The answer is {2 * i}.", "rejected": f"I do not know {i}."} for i in range(1, 13)]


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_llama):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UPO_CACHE", str(tmp_path / "cache"))
    for name in ("RANK", "MLX_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    Path("sweep.yaml").write_text(
        f"base:\n  model: {tiny_llama}\n  device: cpu\n  dtype: float32\n  data: {{train: pairs.jsonl, eval: 0.25}}\n  adapter: {{rank: 2}}\n"
        "  objective: {preference: dpo}\n  optimizer: {warmup_steps: 0}\n  train: {batch_size: 2, steps: 2}\n"
        "  evaluation: {prompts: 2, max_tokens: 6, goals: [{scorer: length, low: 3, high: 9}]}\n"
        "points:\n  - {objective.preference.beta: 0.1}\n  - {objective.preference: modpo, objective.rewards: {scorer: column, column: missing}}\n"
        "  - {objective.preference.beta: 0.5}\n"
    )
    return tmp_path


def upo(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["sweep", "sweep.yaml", "--out", "out", *arguments], catch_exceptions=False, env={"COLUMNS": "140"})


def test_a_sweep_with_a_point_that_fails(here, backend):
    plan = upo("--dry-run", "--backend", backend)
    assert plan.exit_code == 0 and plan.stdout.splitlines()[1].split() == ["beta=0.1", "new"] and not Path("out").exists()
    done = upo("--backend", backend)
    assert done.exit_code == 1
    result = json.loads(Path("out/sweep.json").read_text())
    assert [p["status"] for p in result["points"]] == ["done", "failed", "done"] and result["goals"] == ["accuracy", "goal/length"]
    failed = result["points"][1]["name"]
    assert "on the Pareto front of accuracy, goal/length" in done.stdout and f"{failed} (failed)" in " ".join(done.stdout.split())
    assert "Error: 1 of 3 points failed; the others are done. The same command tries them again." in done.stderr
    assert f'{failed}: pairs.jsonl:1: no number in column "missing"' in done.stderr
    assert done.stderr.count("completions from the cache") == 2 and done.stderr.count("completions scored") == 2  # train and eval rows, once each
    states = [line.split()[-1] for line in upo("--dry-run", "--backend", backend).stdout.splitlines()[1:]]
    assert states == ["done", "new", "done"]
    again = upo("--backend", backend, "--json")
    assert again.exit_code == 1 and again.stderr.count("done already") == 2 and json.loads(again.stdout)["points"][1]["status"] == "failed"


def test_what_is_refused(here, monkeypatch):
    done = upo("--set", "train.stepz=1")
    assert done.exit_code == 1 and "train.stepz: unknown key" in done.stderr and not Path("out").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = upo()
    assert done.exit_code == 1 and "upo sweep runs as one process" in done.stderr and not Path("out").exists()
