"""The quickstart's configuration and the files it stands on, all bundled with the package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from upo.config import RunConfig, load_config

HERE = Path(__file__).parent
TRAIN, HELDOUT, PROMPTS = (HERE / "data" / name for name in ("train.jsonl", "heldout.jsonl", "prompts.jsonl"))


def recipe(model: Path | str, backend: str = "auto", seed: int = 0, steps: int | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """`quickstart.yaml` with its places filled in; overrides are those of `upo train --set`. Raises ConfigError for a bad one."""
    data = yaml.safe_load((HERE / "quickstart.yaml").read_text(encoding="utf-8"))
    data |= {"model": str(model), "backend": backend}
    data["data"] |= {"train": str(TRAIN), "eval": str(HELDOUT)}
    data["train"]["seed"] = seed
    if steps is not None:
        data["train"]["steps"] = steps
    return load_config(data, overrides)


def prompts(split: str) -> list[str]:
    """The questions written for the quickstart: split `train` (70) or `heldout` (40)."""
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    return [row["prompt"] for row in rows if row["split"] == split]
