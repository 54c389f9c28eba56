"""Does the paper's ordering show on a model of 135M parameters? UPO, KTO and DPO with several seeds, its other baselines with one.

    python benchmarks/paper_in_miniature/run.py --out runs/miniature --data hh_harmless.jsonl

Trains every method on the same pairs with the same number of steps, has all of them answer the same held-out prompts, and writes
OUT/table.md and OUT/table.json. What OUT holds is not run again and a run that was stopped goes on, so the same command finishes a table
that was interrupted. A method that fails is named, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of this package

from paper_in_miniature.jobs import Job, jobs_of, run_jobs
from paper_in_miniature.measure import scorers
from paper_in_miniature.methods import METHODS, Settings, configuration
from paper_in_miniature.report import report
from paper_in_miniature.split import read_rows, rows_hash, split, write_rows

from upo.backend import choose, get_backend
from upo.errors import RunError, UpoError
from upo.quickstart.model import model_folder
from upo.training.files import check_writable, write_text
from upo.training.reporter import Silent

DATA = Path(__file__).parents[3] / "shared" / "data" / "hh_harmless.jsonl"
FULL = {"rows": 800, "pairs": 200, "epochs": 1.0, "prompts": 96, "samples": 4, "max_tokens": 64, "seeds": 5}
SHORT = {"rows": 64, "pairs": 32, "epochs": 1.0, "prompts": 16, "samples": 2, "max_tokens": 48, "seeds": 1}
SHORT_METHODS = ("upo", "kto", "dpo")
PLACES = ("model", "train", "heldout")  # of the settings


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and the table")
    parser.add_argument("--data", type=Path, default=DATA, help="pairs as JSON lines, prompt, chosen and rejected being lists of messages")
    parser.add_argument("--model", help="folder or hub id  [default: the quickstart's SmolLM2-135M-Instruct]")
    parser.add_argument("--backend", choices=("auto", "torch", "mlx"), default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the frozen model  [default: the fastest here]")
    parser.add_argument("--short", action="store_true", help="a few minutes, too small to conclude anything: " + ", ".join(f"{k} {v}" for k, v in SHORT.items()))
    parser.add_argument("--only", choices=METHODS, action="append", help="train these methods only; may be repeated")
    parser.add_argument("--seeds", type=int, help="of UPO, KTO and DPO; the others have one  [default: 5]")
    parser.add_argument("--rows", type=int, help="pairs to train on  [default: 800]")
    parser.add_argument("--pairs", type=int, help="held-out pairs, of other conversations  [default: 200]")
    parser.add_argument("--epochs", type=float, help="passes over the pairs  [default: 1]")
    parser.add_argument("--prompts", type=int, help="held-out prompts that are answered  [default: 96]")
    parser.add_argument("--samples", type=int, help="answers to each  [default: 4]")
    parser.add_argument("--max-tokens", type=int, help="longest answer  [default: 64]")
    parser.add_argument("--lr", type=float, default=Settings.lr, help="of all methods  [default: %(default)s]")
    parser.add_argument("--gamma", type=float, default=Settings.gamma, help="how much UPO's goals count beside its preferences  [default: %(default)s]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once on this machine, whose steps then are no measure of time")
    options = parser.parse_args()
    for name, value in (SHORT if options.short else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if options.jobs < 1:
        parser.error("--jobs must be above 0")
    return options


def prepare(options: argparse.Namespace) -> Settings:
    """The split and settings.json, which must be what OUT was begun with. Raises UpoError."""
    check_writable(options.out, "--out")
    train, heldout = split(read_rows(options.data), options.rows, options.pairs)
    backend = choose(options.backend)
    dtype = options.dtype or get_backend(backend).fast_dtype()
    batch = Settings.batch_size
    settings = Settings(
        model=options.model or str(model_folder(Silent())), backend=backend, dtype=dtype, train=str(options.out / "train.jsonl"),
        heldout=str(options.out / "heldout.jsonl"), rows=options.rows, steps=math.ceil(options.rows * options.epochs / batch), lr=options.lr, gamma=options.gamma,
        prompts=options.prompts, samples=options.samples, max_tokens=options.max_tokens,
    )  # fmt: skip
    for name in METHODS:
        configuration(name, 0, settings)  # what is no configuration shows before anything is trained
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"settings": asdict(settings), "short": options.short, "train rows": rows_hash(train), "held-out rows": rows_hash(heldout)}
    begin(options.out / "settings.json", record)
    write_rows(Path(settings.train), train)
    write_rows(Path(settings.heldout), heldout)
    return settings


def begin(file: Path, record: Mapping[str, Any]) -> None:
    """Write settings.json, where it is not there with others. The model and the data may lie elsewhere by now. Raises RunError."""
    if file.exists():
        old, new = (({**r["settings"], **r}) for r in (json.loads(file.read_text(encoding="utf-8")), record))
        if changed := [f"{key}: {old.get(key)!r} there, {new[key]!r} now" for key in new if key not in ("settings", *PLACES) and old.get(key) != new[key]]:
            raise RunError(f"--out {file.parent}: was begun with other settings ({'; '.join(changed)}). Name another folder, or use those.")
    write_text(file, json.dumps(record, indent=2) + "\n")


def main() -> int:
    options = arguments()
    try:
        by = scorers()  # a missing package is said before anything is trained
        settings = prepare(options)
        names = options.only or (SHORT_METHODS if options.short else tuple(METHODS))
        jobs: list[Job] = jobs_of(names, options.seeds, options.out)
        failed = run_jobs(jobs, settings, options.out, options.jobs)
        text = report(jobs, failed, options.out, by, options.short)
    except UpoError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped. The same command goes on.", file=sys.stderr)
        return 130
    print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
