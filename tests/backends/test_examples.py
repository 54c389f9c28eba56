"""The files in examples/: each is a configuration that says what it claims, and trains a tiny model for two steps on either backend."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner
from upo_cli.main import main

from upo.config import load_config
from upo.sweep.points import read_sweep

EXAMPLES = Path(__file__).parents[2] / "examples"
LOSSES = {  # file -> (losses, goals, whether there is an auxiliary term)
    "a_lol": (["a_lol"], ["column", "readability", "length"], False),
    "aoppo": (["offline_ppo"], ["column", "readability", "length"], False),
    "csft": (["csft"], [], False),
    "dpo": (["dpo"], [], False),
    "dro_v": (["dro_v"], ["column", "readability", "length"], False),
    "kto": (["kto"], [], False),
    "modpo": (["modpo"], ["readability", "length"], False),
    "offline_ppo": (["offline_ppo"], ["column"], False),
    "sft": (["sft"], [], False),
    "upo": (["kto"], ["readability", "length"], True),
    "upo_paper": (["kto"], ["readability"], True),
}
SWEEPS = {"sweep"}
PAIRS = [
    {"prompt": f"What is {i} and {i}?", "chosen": f"The answer to that is {2 * i}.", "rejected": "Unfortunately " * (i % 3 + 1) + f"I do not know {i}."} for i in range(1, 11)
]


def test_every_file_is_held_by_a_test():
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == set(LOSSES) | SWEEPS


@pytest.mark.parametrize("name", LOSSES)
def test_what_it_optimises(name):
    config = load_config(EXAMPLES / f"{name}.yaml")
    losses, goals, auxiliary = LOSSES[name]
    objective = config.objective.build()
    assert [term.loss.name for term in objective.preference] == losses
    assert [goal.scorer for goal in config.objective.goals] == goals and (objective.auxiliary is not None) is auxiliary


def test_weights_of_modpo_sum_to_one():
    config = load_config(EXAMPLES / "modpo.yaml")
    loss = config.objective.build().preference[0].loss
    assert loss.label_weight + sum(goal.weight for goal in config.objective.goals) == pytest.approx(1)


def test_the_sweep(monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    sweep = read_sweep(EXAMPLES / "sweep.yaml")
    assert len(sweep.points) == 6 and sweep.front == ("accuracy", "goal/readability", "goal/length")
    assert {(p.config.objective.auxiliary.gamma, p.config.evaluation.prompts) for p in sweep.points} == {(0.3, 32), (1.0, 32)}


@pytest.mark.parametrize("name", LOSSES)
def test_two_steps_on_a_tiny_model(name, backend, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for variable in ("RANK", "MLX_RANK"):
        monkeypatch.delenv(variable, raising=False)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    small = ["train.steps=2", "train.batch_size=4", "optimizer.warmup_steps=0", "optimizer.lr=1e-3", "adapter.rank=2", "device=cpu", "dtype=float32", "data.eval=0.2"]
    small += ["objective.auxiliary.actor_warmup_steps=0"] if name == "upo_paper" else []
    changes = [part for override in (f"model={tiny_llama}", "data.train=pairs.jsonl", *small) for part in ("--set", override)]
    done = CliRunner().invoke(main, ["train", str(EXAMPLES / f"{name}.yaml"), "--backend", backend, "--out", "run", "--json", *changes], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)
    before, after = summary["eval"]["before"], summary["eval"]["after"]
    assert summary["steps"] == 2 and math.isfinite(after["loss"]) and after["logp/chosen"] != before["logp/chosen"]
