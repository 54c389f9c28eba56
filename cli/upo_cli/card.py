"""`upo card`: a README for the model hub."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, allow_dash=True), metavar="FILE", help="Markdown file to write; - for stdout.  [default: README.md in RUN]")
@click.option("--base", metavar="OWNER/NAME", help="Hub id of the base model, where the run names a folder.")
@click.option("--license", metavar="ID", help="Licence of the adapter, e.g. apache-2.0. Left out if not given.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
def card(run: Path, out: Path | None, base: str | None, license: str | None, force: bool) -> None:
    """Write a README for the model hub about the finished RUN: base, data, objective, goals, results with intervals, limits.

    Data is named by hash and by its hub id if it has one: no path of this machine is written. Edit the file as you like; `upo push` takes
    the README.md that it finds in RUN.

    \b
    Examples:
      upo card runs/first --base HuggingFaceTB/SmolLM2-135M-Instruct --license apache-2.0
      upo card runs/first --out -
    """
    from upo.errors import RunError
    from upo.report.card import base_model
    from upo.report.card import card as write
    from upo.report.read import read_run
    from upo.training.files import write_text, writing

    told = read_run(run)
    text = write(told, base, license)
    if base_model(told, base) is None:
        click.echo("Note: the base model is a folder here, so the card names no base_model. Add --base owner/name.", err=True)
    for note in told.notes:
        click.echo(f"Note: {note}", err=True)
    if str(out) == "-":
        return click.echo(text, nl=False)
    out = out or run / "README.md"
    there = out.exists()
    if there and not force:
        raise RunError(f"{out}: exists already. Add --force to replace it, or name another file with --out.")
    with writing(out, "Name another place with --out."):
        write_text(out, text)
    click.echo(f"Card: {out}" + (" (replaces the one that was there)" if there else ""))
