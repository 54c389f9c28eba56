"""What is trained: the paper's methods, from the configurations in examples/, with one data set, adapter, schedule and number of steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upo.config import RunConfig, load_config

EXAMPLES = Path(__file__).parents[2] / "examples"
# The paper's weights. On the answers of the data, readability spreads by 0.41 and profanity by 0.18 (standard deviations).
GOALS = ({"scorer": "readability", "weight": 0.05}, {"scorer": "profanity", "weight": 0.95})
LABEL = {"scorer": "column", "column": "label", "weight": 1.0}


@dataclass(frozen=True)
class Settings:
    """What all runs have in common."""

    model: str
    backend: str
    dtype: str
    train: str  # file with the rows
    heldout: str  # file with other prompts
    rows: int  # to train on
    steps: int
    batch_size: int = 8
    max_length: int = 512
    lr: float = 3e-4
    gamma: float = 0.1  # of UPO alone: how much the goals count. At the paper's 0.5 its preference accuracy is chance here (docs/results.md)
    prompts: int = 96  # held-out ones that are answered
    samples: int = 4  # to each
    max_tokens: int = 64


@dataclass(frozen=True)
class Method:
    """A configuration of examples/, and where in it the goals go."""

    title: str
    example: str
    goals: str | None = None  # key in the configuration; None: it has none
    label: bool = False  # the reward is the label plus the goals
    scale: float = 1.0  # of the goals' weights
    seeded: bool = False  # compared with intervals, so it has several seeds
    changes: Mapping[str, Any] = field(default_factory=dict)  # of the configuration


# V stays the mean reward of the data, so an answer competes with those to all prompts and not with the one other answer to its own.
# The temperature is higher and gamma lower, as the weights are 4 on average then; tried on prompts that the table does not use.
CONSTANT_V = {
    "objective.auxiliary.temperature": 20.0,
    "objective.auxiliary.gamma": 0.03,
    "objective.auxiliary.value_coef": 0.0,
    "objective.auxiliary.value.fit_steps": 0,
}
METHODS = {
    "upo": Method("UPO", "upo", "objective.auxiliary.rewards", seeded=True),
    "upo_mean": Method("UPO, constant V", "upo", "objective.auxiliary.rewards", seeded=True, changes=CONSTANT_V),
    "kto": Method("KTO", "kto", seeded=True),
    "dpo": Method("DPO", "dpo", seeded=True),
    "sft": Method("SFT", "sft"),
    "csft": Method("CSFT", "csft"),
    "offline_ppo": Method("oPPO", "offline_ppo"),
    "modpo": Method("MODPO", "modpo", "objective.rewards", scale=0.5),  # sums to 1 with its label_weight of 0.5
    "a_lol": Method("A-LoL", "a_lol", "objective.rewards", label=True),
    "aoppo": Method("aoPPO", "aoppo", "objective.rewards", label=True),
    "dro_v": Method("DRO-V", "dro_v", "objective.rewards", label=True),
}


def configuration(name: str, seed: int, settings: Settings) -> RunConfig:
    """The run of a method. Raises ConfigError."""
    method = METHODS[name]
    changes: dict[str, Any] = {
        "model": settings.model,
        "backend": settings.backend,
        "dtype": settings.dtype,
        "data.train": settings.train,
        "data.eval": 0.0,  # scored afterwards, for all methods in the same way
        "optimizer": {"name": "adamw", "lr": settings.lr, "schedule": "cosine", "warmup_steps": 5},
        "train": {"steps": settings.steps, "batch_size": settings.batch_size, "max_length": settings.max_length, "seed": seed, "save_every": 50, "keep_checkpoints": 1},
    }
    if method.goals is not None:
        goals = [{**goal, "weight": method.scale * float(str(goal["weight"]))} for goal in GOALS]
        changes[method.goals] = [LABEL, *goals] if method.label else goals
    if name == "upo":
        changes["objective.auxiliary.gamma"] = settings.gamma
    changes |= method.changes
    return load_config(EXAMPLES / f"{method.example}.yaml", [f"{key}={json.dumps(value)}" for key, value in changes.items()])
