"""`upo report`: one self-contained HTML file about one run or several."""

from __future__ import annotations

from pathlib import Path

import click

from upo_cli.options import echo_json, json_option


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="HTML file to write.  [default: report.html in RUN, or here for several]")
@click.option("--force", is_flag=True, help="Replace FILE even if it is no report of upo.")
@json_option
def report(runs: tuple[Path, ...], out: Path | None, force: bool, as_json: bool) -> None:
    """Write a report on RUN, or compare several: goals before and after with intervals, trade-off, curves, answers, configuration, data, costs.

    The file opens offline, loads nothing and runs no script; it shows no path of this machine. A run that has not ended is reported as far
    as it is. An earlier report is replaced.

    \b
    Examples:
      upo report runs/first
      upo report runs/upo runs/dpo runs/kto --out compared.html
    """
    from upo.report.page import write_report

    written = write_report(runs, out or (runs[0] if len(runs) == 1 else Path()) / "report.html", force)
    for note in written.notes:
        click.echo(f"Note: {note}", err=True)
    if as_json:
        return echo_json({"report": str(written.out), "replaced": written.replaced, "notes": written.notes})
    click.echo(f"Report: {written.out}" + (" (replaces the earlier one)" if written.replaced else ""))
