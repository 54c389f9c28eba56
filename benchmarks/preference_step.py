"""How fast, and in how much memory, is a LoRA preference step: upo against TRL and mlx-lm-lora on the same work.

    python benchmarks/preference_step.py --out runs/bench --venvs .venvs

Without --only, everything in this order: the check that all do the same work, the table of contenders, each technique on and off, time and
memory against length, completions per prompt and rows, and UPO against KTO. Runs that --out holds are not repeated, so a stopped call goes on
where it was. Every run is a process of its own; those of several contenders alternate. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from harness import lineup
from harness.lineup import wanted
from harness.peers import header, pythons
from harness.runs import Failed, Run, interleaved, same_tokens
from harness.tables import of_runs, ratios, table
from harness.work import ROWS, Work, prepare, quickstart_model, real_rows
from lengths import lengths
from objective import objective
from same_work import same_work

from upo.errors import UpoError

PARTS = ("same-work", "table", "techniques", "lengths", "objective")


def contenders_table(work: Work, folder: Path, options: argparse.Namespace) -> str:
    """Every contender of the chosen backends, and ours against each."""
    chosen = [c for backend in options.backends for c in (lineup.COMPARED[backend][0], *lineup.COMPARED[backend][1]) if wanted(c, options)]
    found = interleaved(chosen, work, folder, pythons(options.venvs, {c.program for c in chosen}), options.repeats)
    runs = [run for name in found for run in found[name]]
    same_tokens(runs)
    text = f"## A step of {work.batch_size} pairs\n\n{header(runs)}\n{describe(work, runs[0])} {options.repeats} runs each, alternating; medians.\n\n"
    text += speed_table(found)
    lines = []
    for backend in options.backends:
        ours, others = lineup.COMPARED[backend]
        for other in others:
            if ours.name in found and other.name in found:
                a, b = found[ours.name], found[other.name]
                speed, steps = ratios(a, b, lambda run: run.rows_per_s), "–"
                if all(run.rows_per_s_steps for run in (*a, *b)):
                    steps = str(ratios(a, b, lambda run: run.rows_per_s_steps or 0.0))
                lines.append((f"{ours.name} / {other.name}", speed, steps, ratios(a, b, lambda run: run.peak_memory_gb)))
    columns = ("ours / theirs: median (min to max), run by run", "pairs/s", "without the reference", "memory")
    return text + "\n" + table(columns, lines) + "\n" + setups(found)


def techniques_table(work: Work, folder: Path, options: argparse.Namespace) -> str:
    """Ours, and ours with one technique changed at a time."""
    parts = []
    for backend in options.backends:
        chosen = [c for c in lineup.techniques(backend) if wanted(c, options)]
        found = interleaved(chosen, work, folder, pythons(options.venvs, ["upo"]), options.repeats)
        runs = [run for name in found for run in found[name]]
        same_tokens(runs)
        base = found[chosen[0].name]
        lines = [
            (name, of_runs(rs, lambda r: r.rows_per_s), ratios(rs, base, lambda r: r.rows_per_s), of_runs(rs, lambda r: r.peak_memory_gb), ratios(rs, base, lambda r: r.peak_memory_gb))
            for name, rs in found.items()
        ]
        columns = ("ours, one thing changed", "pairs/s", "as a multiple of the first line", "GB", "as a multiple")
        parts.append(f"### {backend}\n\n{header(runs)}\n{describe(work, runs[0])} {options.repeats} runs each, alternating.\n\n{table(columns, lines)}")
    return "## One technique at a time\n\n" + "\n".join(parts)


def speed_table(found: dict[str, list[Run]]) -> str:
    """Medians of each contender."""
    columns: Sequence[tuple[str, Callable[[Run], float | None]]] = (
        ("pairs/s", lambda run: run.rows_per_s),
        ("without the reference", lambda run: run.rows_per_s_steps),
        ("peak memory, GB", lambda run: run.peak_memory_gb),
        ("start to first work, s", lambda run: run.start_s),
        ("start to end of first step, s", lambda run: run.first_step_s),
        ("whole process, s", lambda run: run.wall_s),
    )
    return table(("", *(title for title, _ in columns)), [(name, *(of_runs(runs, of) for _, of in columns)) for name, runs in found.items()])


def describe(work: Work, run: Run) -> str:
    tokens = run.tokens
    return (
        f"{work.pairs} pairs, {work.steps} steps of {work.batch_size}, at most {work.max_length} tokens ({tokens['prompt']:,} prompt and "
        f"{tokens['completion']:,} completion tokens in all); LoRA rank {work.rank}, alpha {work.alpha}, all linear layers; DPO; {Path(work.model).name}."
    )


def setups(found: dict[str, list[Run]]) -> str:
    """What each contender said about its settings."""
    lines = [f"- {name}: " + ", ".join(f"{key} {value}" for key, value in runs[0].setup.items()) for name, runs in found.items() if runs[0].setup]
    notes = [f"- {name}: {note}" for name, runs in found.items() for note in dict.fromkeys(note for run in runs for note in run.notes)]
    return "\n".join([*lines, *notes]) + "\n" if lines or notes else ""


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, required=True, help="folder for runs, tables and plot")
    found.add_argument("--venvs", type=Path, default=Path(".venvs"), help="folder of the peers' environments; made if missing (a few minutes, 2 GB)")
    found.add_argument("--only", choices=PARTS, action="append", help="this part only; may be repeated")
    found.add_argument("--backends", choices=("torch", "mlx"), nargs="+", default=["torch", "mlx"])
    found.add_argument("--contender", action="append", help="only contenders whose name has this in it; may be repeated")
    found.add_argument("--repeats", type=int, default=3, help="runs of each contender")
    found.add_argument("--data", type=Path, default=ROWS, help="JSON lines with prompt, chosen, rejected")
    found.add_argument("--rows", type=int, default=24, help="how many of them, from the first")
    found.add_argument("--batch-size", type=int, default=8)
    found.add_argument("--max-length", type=int, default=1024)
    found.add_argument("--model", type=Path, help="model folder; default: SmolLM2-135M-Instruct as `upo quickstart` finds it")
    found.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192], help="tokens of prompt and completion together")
    found.add_argument("--completions", type=int, nargs="+", default=[1, 2, 4, 8], help="completions per prompt")
    found.add_argument("--rows-a-step", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="pairs in a step, of one length")
    return found


def main() -> None:
    options = parser().parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.model = options.model or quickstart_model()
    rows = real_rows(options.data, options.rows)
    for part in options.only or PARTS:
        folder, unequal = options.out / part, []
        if part == "same-work":
            chosen = [c for c in lineup.EQUAL if wanted(c, options)]
            text, unequal = same_work(folder, rows, options.model, pythons(options.venvs, {c.program for c in chosen}), chosen, options.max_length)
        elif part == "lengths":
            text = lengths(folder, options)
        else:
            work = prepare(folder / "work", rows, options.model, batch_size=options.batch_size, max_length=options.max_length)
            text = {"table": contenders_table, "techniques": techniques_table, "objective": objective}[part](work, folder, options)
        (options.out / f"{part}.md").write_text(text, encoding="utf-8")
        print(text, flush=True)
        if unequal:
            raise Failed("the contenders do not do the same work, so nothing else is measured: " + " ".join(unequal))


if __name__ == "__main__":
    try:
        main()
    except (Failed, UpoError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
