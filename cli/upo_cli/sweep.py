"""`upo sweep`: many runs that differ in a few keys, and the trade-off they show."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from upo_cli.options import allow_code_option, backend_option, echo_json, echo_table, json_option, quiet_option
from upo_cli.progress import number, reporting


@click.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="SWEEP")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", required=True, help="Folder with a run for each point; may hold some already.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a configuration key of every point. May be repeated.")
@click.option("--dry-run", is_flag=True, help="List the points, and which are done, and stop.")
@backend_option
@json_option
@allow_code_option
@quiet_option
def sweep(file: Path, out: Path, overrides: tuple[str, ...], dry_run: bool, backend: str | None, as_json: bool, allow_code: bool, quiet: bool) -> None:
    """Train every point of the YAML file SWEEP, one after the other, and mark those on the Pareto front.

    SWEEP names a `base` configuration and a `grid` of keys with lists of values, `points` (a list of mappings), or both, which are then
    combined; `front` lists the metrics to weigh, by default accuracy and the goals on sampled answers (evaluation.prompts). References and
    rewards are scored once. A point that fails does not stop the others; the same command goes on: what is done is not run again.

    \b
    Example, sweep.yaml:
      base: my.yaml
      grid:
        objective.auxiliary.gamma: [0.3, 1.0]
        objective.auxiliary.temperature: [1.0, 5.0]
    \b
      upo sweep sweep.yaml --out runs/trade-off --dry-run
      upo sweep sweep.yaml --out runs/trade-off
    """
    from upo.backend import get_backend
    from upo.errors import BackendError
    from upo.sweep.points import read_sweep
    from upo.sweep.run import FILE, finished, run_sweep, unfinished

    found = read_sweep(file, [*overrides, *([f"backend={backend}"] if backend else [])])
    if dry_run:
        states = ["done" if finished(p, out) is not None else "to go on with" if unfinished(p, out) else "new" for p in found.points]
        if as_json:
            echo_json([{"name": p.name, "set": p.set, "state": state} for p, state in zip(found.points, states, strict=True)])
        else:
            echo_table([("point", "state"), *((p.name, state) for p, state in zip(found.points, states, strict=True))])
        return
    if os.environ.get("WORLD_SIZE", "1") != "1" or "MLX_RANK" in os.environ:
        raise BackendError("upo sweep runs as one process. Start it without torchrun or mlx.launch, or train the points with upo train.")
    for name in {point.config.backend for point in found.points}:
        get_backend(name)  # a missing one is said before anything runs
    with reporting(quiet) as reporter:
        result = run_sweep(found, out, reporter=reporter, allow_code=allow_code)
    if as_json:
        echo_json(result)
    else:
        _show(result, out / FILE)
    if failed := [point for point in result["points"] if point["status"] == "failed"]:
        lines = "".join(f"\n  {point['name']}: {point['error']}" for point in failed)
        raise click.ClickException(f"{len(failed)} of {len(result['points'])} points failed; the others are done. The same command tries them again.{lines}")


def _show(result: Mapping[str, Any], written: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    names: Sequence[str] = result["goals"]
    console = Console(highlight=False, soft_wrap=False)
    table = Table(title=Text(f"{len(result['points'])} points; * on the Pareto front of {', '.join(names)}" if names else f"{len(result['points'])} points"))
    table.add_column("")
    table.add_column("point")
    for name in names:
        table.add_column(Text(name), justify="right")
    for point in result["points"]:
        values = [point["metrics"].get(name) for name in names]
        cells = ["" if value is None else number(value, ".3f") for value in values]
        table.add_row("*" if point["front"] else "", Text(point["name"] + ("" if point["status"] == "done" else f" ({point['status']})")), *cells)
    console.print(table)
    if not any(name.startswith("goal/") for name in names):
        click.echo("No goal is among the metrics: evaluation.prompts above 0 has them scored on sampled answers.")
    click.echo(f"\nAll numbers: {written}\n\nNext:\n  upo eval {written.parent}/NAME    intervals, win rate and samples of a point")
