"""docs/goals.md, tried as written: every file and every command of the page, with a tiny model in the place of the named one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from upo.quickstart.recipe import TRAIN

pytest.importorskip("torch")

PAGE = Path(__file__).parents[2] / "docs" / "goals.md"
BLOCK = re.compile(r"```(sh|yaml)\n(.*?)```", re.DOTALL)
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_page_is_read_whole():
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert [kind for kind, _ in blocks] == ["sh", "sh", "yaml", "sh", "sh", "yaml", "sh", "sh"] and PAGE.read_text(encoding="utf-8").count("```") == 2 * len(blocks)
    assert sum(len(text.splitlines()) for kind, text in blocks if kind == "sh") == 13


@pytest.mark.slow
def test_as_written(tmp_path, tiny_llama):
    (tmp_path / "preferences.jsonl").write_text(TRAIN.read_text(encoding="utf-8"), encoding="utf-8")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "UPO_CACHE": str(tmp_path / "cache")}
    for kind, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if kind == "yaml":
            name = re.match(r"# (\S+\.yaml)\n", text)
            assert name
            (tmp_path / name[1]).write_text(text.replace(MODEL, f"{tiny_llama}\nbackend: torch\ndevice: cpu"), encoding="utf-8")
            continue
        for command in text.splitlines():
            if command.startswith(("upo card", "upo push")):
                command += f" --base {MODEL}"  # the tiny model has no name on the hub
            done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False)
            assert done.returncode == 0, f"{command}\n{done.stderr}"

    run = tmp_path / "runs" / "plain"
    evaluation = json.loads((run / "eval.json").read_text())
    assert {"readability", "length"} <= set(evaluation["goals"]) and all({"low", "mean", "high"} <= set(goal["change"]) for goal in evaluation["goals"].values())
    steps = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line.get("eval")]
    assert all("goal/readability" in line and "accuracy" in line for line in steps) and len(steps) >= 2
    points = json.loads((tmp_path / "runs" / "balance" / "sweep.json").read_text())["points"]
    assert [point["status"] for point in points] == ["done"] * 3 and any(point["front"] for point in points)
    assert "readability" in (run / "report.html").read_text() and "gamma" in (tmp_path / "balance.html").read_text()
    assert (run / "README.md").read_text().startswith("---\n") and (tmp_path / "plain-merged" / "model.safetensors").is_file()
