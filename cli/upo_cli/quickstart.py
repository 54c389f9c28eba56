"""`upo quickstart`: the main job on a small model with bundled data, and what it changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from upo_cli.options import backend_option, echo_json, json_option, quiet_option, rank
from upo_cli.progress import duration, reporting

# key in the result, label, format
ROWS = (
    ("reward", "auxiliary reward (readability, 0 to 1)", ".3f"),
    ("grade", "school grade of the text (Flesch-Kincaid)", ".1f"),
    ("accuracy", "preference accuracy on held-out pairs", ".2f"),
    ("words", "words per answer", ".1f"),
    ("repetition", "repeated word trigrams", ".1%"),
    ("empty", "empty answers", "d"),
)


@click.command()
@backend_option
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder of the run; it must not exist.  [default: runs/quickstart, or -2, ...]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of order, initial weights and sampling.")
@click.option("--steps", type=click.IntRange(min=1), help="Fewer optimizer steps, to try things out.  [default: the recipe's 60]")
@click.option("--model", metavar="M", help="Another model: hub id or folder.  [default: SmolLM2-135M-Instruct]")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help='Change the recipe, e.g. "objective={preference: {loss: dpo}}". May be repeated.')
@json_option
@quiet_option
def quickstart(
    backend: str | None, out: Path | None, seed: int, steps: int | None, model: str | None, overrides: tuple[str, ...], as_json: bool, quiet: bool
) -> None:
    """Teach a 135M model plainer language, and see what it changed.

    UPO with readability as the goal, on 120 bundled preference pairs whose labels say nothing about readability. Answers to held-out
    questions are sampled before and after. Takes a few minutes on a laptop; the model (93 to 270 MB) is fetched once and kept.

    \b
    Examples:
      upo quickstart
      upo quickstart --backend mlx --out runs/plain --seed 1
      upo quickstart --set "objective={preference: {loss: dpo}}"      (a control without the goal)
    """
    from upo.quickstart.run import run_quickstart

    folder = _folder(out)
    with reporting(quiet) as reporter:
        reporter.info(f"Run folder: {folder}")
        result = run_quickstart(folder, backend=backend or "auto", seed=seed, steps=steps, model=model, overrides=overrides, reporter=reporter)
    if rank():
        return
    if as_json:
        echo_json(result)
    else:
        _show(result, folder)


def _folder(out: Path | None) -> Path:
    """--out, which must not exist, or the first free default."""
    from upo.errors import RunError

    if out is not None:
        if out.exists():
            raise RunError(f"--out {out}: exists already, and nothing is overwritten. Name another folder.")
        return out
    base = Path("runs") / "quickstart"
    number = 2
    folder = base
    while folder.exists():
        folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    return folder


def _show(result: dict[str, Any], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=False)
    table = Table(title=f"{result['prompts']} held-out questions, {result['samples']} answers to each")
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    for key, label, spec in ROWS:
        before, after = result["before"][key], result["after"][key]
        if before is not None and after is not None:
            table.add_row(label, format(before, spec), format(after, spec))
    console.print(table)
    console.print(verdict(result["reward_change"]))
    example = result["example"]
    sides = Table(title=Text(example["prompt"]), show_lines=True)
    sides.add_column("before", ratio=1)
    sides.add_column("after", ratio=1)
    sides.add_row(Text(example["before"]), Text(example["after"]))
    console.print(sides)
    console.print(Text("One sample each, for the question with the median change. A model of this size is often wrong, before and after: plainer, not better."))
    seconds = result["seconds"]
    parts = ", ".join(f"{name} {duration(seconds[name])}" for name in ("model", "prepare", "answers", "train"))
    console.print(Text(f"\n{result['backend']} on {result['device']} in {result['dtype']}, {duration(seconds['total'])} ({parts}). Figures: {folder / 'quickstart.json'}"))
    click.echo(
        f"Report: {folder / 'report.html'}\n"
        "\nNext:\n"
        f'  upo generate {folder} --prompt "How does a bicycle stay upright?"\n'
        f"  upo train {folder / 'config.yaml'} --set optimizer.lr=2e-4      the same run, changed\n"
        f"  upo report {folder} OTHER...                                compare runs in one page\n"
        "  upo train examples/upo.yaml --set data.train=YOUR.jsonl     your own data and goals\n"
        "  upo losses                                                  what else can be optimised"
    )


def verdict(change: dict[str, float]) -> str:
    """The change of the auxiliary reward with its interval, and whether it is one."""
    numbers = f"{change['mean']:+.3f}, 95 % interval {change['low']:+.3f} to {change['high']:+.3f}"
    if change["low"] > 0:
        return f"The auxiliary reward rose: {numbers}."
    if change["high"] < 0:
        return f"The auxiliary reward fell: {numbers}."
    return f"No change of the auxiliary reward is shown: {numbers}."
