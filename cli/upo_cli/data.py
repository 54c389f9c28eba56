"""`upo data`: what a data file holds and what training would make of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from upo_cli.goals import layout_option
from upo_cli.options import echo_json, json_option
from upo_cli.profile import profile

if TYPE_CHECKING:
    from rich.console import Console

    from upo.data.check import CheckReport, Lengths

SHOWN = 20  # errors; --json lists all
DUPLICATES = 3  # prompts in several rows, likewise


@click.group()
def data() -> None:
    """Look at preference data before training on it."""


data.add_command(profile)


@data.command()
@click.argument("file")
@click.option("--model", metavar="M", help="Hub id or folder of the model: lengths in tokens, and what would be dropped or cut.")
@click.option("--revision", metavar="R", help="Revision of a hub model.")
@click.option("--max-length", type=click.IntRange(min=2), default=1024, show_default=True, help="train.max_length; needs --model.")
@click.option("--overflow", type=click.Choice(["drop", "cut"]), default="drop", show_default=True, help="train.overflow; needs --model.")
@click.option("--eval", "eval_file", metavar="FILE", help="Held-out file: which of its prompts are also in FILE.")
@layout_option
@json_option
@click.pass_context
def check(
    ctx: click.Context,
    file: str,
    model: str | None,
    revision: str | None,
    max_length: int,
    overflow: str,
    eval_file: str | None,
    layout: str,
    as_json: bool,
) -> None:
    """Show the layout of FILE, counts, lengths, and what would be dropped or cut and why.

    FILE is .jsonl, .json (one object a line), .parquet, .csv, or a hub dataset (owner/name, owner/name:split). Without --model nothing
    is loaded and lengths are words. The exit code is 1 if training would refuse the file.

    \b
    Examples:
      upo data check pairs.jsonl
      upo data check pairs.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct --max-length 512
    """
    from upo.data.check import check as check_file

    tokenizer = None
    if model is None:
        given = [name for name in ("revision", "max_length", "overflow") if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        if given:
            raise click.UsageError(f"--{given[0].replace('_', '-')} needs the model's tokens: add --model M.")
    else:
        from upo.data.tokenizer import load_tokenizer
        from upo.models import resolve

        tokenizer = load_tokenizer(resolve(model, revision, weights=False))
    report = check_file(file, tokenizer, max_length, overflow=overflow, layout=layout, eval_path=eval_file)
    if as_json:
        echo_json(report.to_json())
    else:
        _show(report)
    ctx.exit(0 if report.ok else 1)


def _show(report: CheckReport) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for label, text in _summary(report):
        console.print(f"[bold]{label:<10}[/]", end="")
        console.print(text, markup=False)
    _show_lengths(report, console)
    _show_findings(report, console)


def _summary(report: CheckReport) -> list[tuple[str, str]]:
    from upo.data.notes import plural

    lines = [
        ("file", report.file),
        ("layout", f"{report.layout}: {report.shape}" if report.shape else report.layout),
        ("rows", f"{report.rows:,} of {report.records:,} can be trained on, with {plural(report.completions, 'completion')}"),
        ("labels", ", ".join(f"{count:,} {name}" for name, count in report.labels.items() if count) or "none"),
        ("prompts", f"{report.prompts:,} different" + (f", {len(report.duplicate_prompts):,} in several rows" if report.duplicate_prompts else "")),
    ]
    for name, c in report.columns.items():
        lines.append(("column", f"{name}: in {plural(int(c['rows']), 'row')}, {c['min']:.4g} to {c['max']:.4g}, mean {c['mean']:.4g}"))
    if report.ignored:
        lines.append(("not used", ", ".join(report.ignored)))
    if report.no_end is not None:
        missing = f"missing in {plural(len(report.no_end), 'row')}" if report.no_end else "on every completion"
        lines.append(("turn end", f"{report.turn_end} {missing}"))
    if report.eval_file is not None:
        lines.append(("eval", f"{report.eval_file}: {plural(len(report.overlap), 'row')} with a prompt of this file"))
    return lines


def _show_lengths(report: CheckReport, console: Console) -> None:
    from rich.table import Table

    if not report.lengths:
        return
    limit = "" if report.max_length is None else f" (at most {report.max_length} for a row: prompt and longest completion)"
    table = Table(box=None, padding=(0, 2, 0, 0), title=f"Lengths in {report.unit}{limit}", title_justify="left", title_style="bold")
    for name in ("", "min", "median", "95 %", "max"):
        table.add_column(name, justify="right" if name else "left")
    for name, lengths in report.lengths.items():
        table.add_row(name, *(f"{n:,}" for n in (lengths.minimum, lengths.median, lengths.p95, lengths.maximum)))
    console.print()
    console.print(table)
    console.print()
    for text in _histogram(report.lengths["row"]):
        console.print(text, markup=False)


def _histogram(lengths: Lengths) -> list[str]:
    """One line per bin, the longest bar 40 characters; a bin that holds anything has a bar."""
    width, most = len(f"{lengths.edges[-1]:,}"), max(lengths.counts)
    lines = []
    for low, high, count in zip(lengths.edges, lengths.edges[1:], lengths.counts, strict=False):
        bar = "#" * -(-40 * count // most)
        span = f"{low:>{width},}" + (f" to {high - 1:>{width},}" if high - low > 1 else "")
        lines.append(f"{span}  {bar:<40} {count:,}")
    return lines


def _show_findings(report: CheckReport, console: Console) -> None:
    from upo.data.notes import Notes, places, plural

    findings = [("yellow" if warning else "dim", text) for warning, text in Notes(report.notes).lines()]
    findings += [("yellow", f"{plural(len(rows), 'row')} without a finite number in column {name} ({places(rows)}).") for name, rows in report.gaps.items()]
    for group in report.duplicate_prompts[:DUPLICATES]:
        findings.append(("dim", f"{plural(len(group), 'row')} with one prompt ({places(group)})."))
    if len(report.duplicate_prompts) > DUPLICATES:
        findings.append(("dim", f"{len(report.duplicate_prompts) - DUPLICATES:,} more prompts in several rows; --json lists all."))
    if report.labels["desirable"] + report.labels["undesirable"] and not (report.labels["desirable"] and report.labels["undesirable"]):
        findings.append(("yellow", "All labels are the same: kto has nothing to tell apart; sft can learn from desirable completions."))
    if report.overlap:
        findings.append(("yellow", f"{plural(len(report.overlap), 'row')} of {report.eval_file} with a prompt of this file ({places(report.overlap)})."))
    findings += [("red", message) for message in report.errors[:SHOWN]]
    if len(report.errors) > SHOWN:
        findings.append(("red", f"{len(report.errors) - SHOWN:,} more rows that cannot be used; --json lists all."))
    if not report.rows:
        findings.append(("red", "No row is left to train on."))
    if findings:
        console.print()
    for style, text in findings:
        console.print(text, style=style, markup=False)
