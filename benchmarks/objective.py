"""What UPO adds to KTO: calls of the model, and time of the step."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from harness.lineup import upo
from harness.peers import header, pythons
from harness.runs import Contender, Failed, measure
from harness.tables import spread, table
from harness.work import Work

LEAST_STEPS = 8


def objective(work: Work, folder: Path, options: argparse.Namespace) -> str:
    """Markdown. Raises Failed if UPO calls the model more often than KTO."""
    steps = max(LEAST_STEPS, work.steps)
    work = replace(work, steps=steps)
    lines, runs = [], []
    for backend in options.backends:
        base = upo(backend, "bfloat16" if backend == "torch" else "float32", name="UPO and KTO")
        contender = Contender(base.name, "upo-objective", base.settings)
        run = measure(contender, work, folder / contender.folder, pythons(options.venvs, ["upo-objective"]))
        found = json.loads((folder / contender.folder / "result.json").read_text(encoding="utf-8"))["objective"]
        calls, seconds = found["calls"], found["seconds"]
        if calls["upo"] != calls["kto"] or not all(calls["upo"]):
            raise Failed(f"{backend}: UPO calls the model's attention {calls['upo']} times, step by step, KTO {calls['kto']}")
        ratio = spread([a / b for a, b in list(zip(seconds["upo"], seconds["kto"], strict=True))[1:]])  # the first pair warms up
        lines.append((backend, f"{spread(seconds['kto']).median:.2f}", f"{spread(seconds['upo']).median:.2f}", f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})", sum(calls["kto"]), sum(calls["upo"])))
        runs.append(run)
    columns = ("backend", "KTO, s a step", "UPO, s a step", "UPO / KTO", "attention calls, KTO", "UPO")
    return f"## UPO against KTO\n\n{header(runs)}\n{steps} steps of {work.batch_size} pairs, alternating in one process.\n\n{table(columns, lines)}"
