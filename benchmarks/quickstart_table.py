"""Does the goal move, and only because of the goal? The quickstart with three seeds, and its controls, as one table.

    python benchmarks/quickstart_table.py --backend torch --out runs/table-torch

Runs `upo quickstart` once for each line, one after the other, and prints a Markdown table. Lines whose folder holds a result are not run
again, so a stopped table goes on where it was. Six runs of about 4 minutes on two idle CPU cores with torch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

RUNS = {
    "UPO": (),
    "UPO without advantage (lambda 0)": ("objective.auxiliary.temperature=0",),
    "KTO": ("objective={preference: {loss: kto, beta: 0.1}}",),
    "DPO": ("objective={preference: {loss: dpo, beta: 0.1}}",),
}
CONTROL_SEEDS = 1  # the claim is about UPO; the controls say what the same steps do without the goal


def run(name: str, seed: int, backend: str, folder: Path) -> dict:
    """The result of one line, from its folder if it is there."""
    result = folder / "quickstart.json"
    if not result.exists():
        command = [sys.executable, "-m", "upo_cli", "quickstart", "--backend", backend, "--seed", str(seed), "--out", str(folder), "--quiet"]
        for override in RUNS[name]:
            command += ["--set", override]
        print(f"+ {name}, seed {seed}", file=sys.stderr, flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(result.read_text(encoding="utf-8"))


def row(name: str, seed: int, found: dict) -> str:
    """One line of the table."""
    change, before, after = found["reward_change"], found["before"], found["after"]
    interval = f"{change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
    accuracy = f"{before['accuracy']:.2f} -> {after['accuracy']:.2f}"
    words = f"{before['words']:.1f} -> {after['words']:.1f}"
    repetition = f"{before['repetition']:.1%} -> {after['repetition']:.1%}"
    grade = f"{before['grade']:.1f} -> {after['grade']:.1f}"
    minutes = f"{found['seconds']['total'] / 60:.1f}"
    return f"| {name} | {seed} | {before['reward']:.3f} | {interval} | {grade} | {accuracy} | {words} | {repetition} | {after['empty']} | {minutes} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("torch", "mlx"), default="torch")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the UPO line")
    parser.add_argument("--only", choices=RUNS, action="append", help="run these lines only")
    options = parser.parse_args()
    print("| run | seed | reward before | change, 95 % interval | grade | accuracy | words | repetition | empty | minutes |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in options.only or RUNS:
        for seed in range(options.seeds if name == "UPO" else CONTROL_SEEDS):
            folder = options.out / f"{name.split(' (')[0].lower().replace(' ', '-')}-{seed}"
            print(row(name, seed, run(name, seed, options.backend, folder)), flush=True)


if __name__ == "__main__":
    main()
