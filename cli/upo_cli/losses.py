"""`upo losses`: the loss specification, read from the classes that execute it."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

import click

from upo.errors import did_you_mean
from upo.losses import LOSSES, Auxiliary, loss_options
from upo_cli.options import echo_json, echo_table, json_option

AUXILIARY = "auxiliary"  # a term of the objective beside the preference losses, not a preference loss
ALIASES = {"upo": AUXILIARY}
DATA = {
    "pairs": "pairs (chosen, rejected)",
    "labels": "completions with a label, or pairs",
    "chosen": "chosen or desirable completions",
    "scored": "completions with a reward",
}
UNITS = {"chosen": "chosen completion"}


@click.command()
@click.argument("name", required=False)
@json_option
def losses(name: str | None, as_json: bool) -> None:
    """List the losses, or explain the loss NAME: formula, symbols, options with their defaults, source.

    `auxiliary` (or `upo`) is the term with goals of your own; it is added to a preference loss under objective.auxiliary.

    \b
    Examples:
      upo losses
      upo losses kto
    """
    if name is None:
        entries = [_describe(each) for each in (*LOSSES, AUXILIARY)]
        if as_json:
            echo_json(entries)
            return
        for entry in entries:
            for first, text in ((entry["name"], entry["summary"]), ("", f"Data: {entry['data']}. One value per {entry['unit']}."), ("", entry["source"])):
                click.echo(textwrap.fill(text, 100, initial_indent=f"{first:12}", subsequent_indent=" " * 12))
            click.echo()
        click.echo("upo losses NAME shows formula and options.")
        return
    known = ALIASES.get(name.lower(), name.lower())
    if known not in (*LOSSES, AUXILIARY):
        raise click.UsageError(f'There is no loss "{name}".{did_you_mean(name, (*LOSSES, AUXILIARY))}')
    entry = _describe(known)
    if as_json:
        echo_json(entry)
    else:
        _echo_entry(entry)


def _describe(name: str) -> dict[str, Any]:
    loss: Any = Auxiliary if name == AUXILIARY else LOSSES[name]
    text = inspect.cleandoc(loss.__doc__)
    data, unit = ("scored", "completion") if name == AUXILIARY else (loss.data, loss.unit)
    return {
        "name": name,
        "summary": text.splitlines()[0],
        "data": DATA[data],
        "unit": UNITS.get(unit, unit),
        "needs": sorted({"rewards", "value"} if name == AUXILIARY else loss.needs),
        "options": loss_options(loss),
        "source": loss.source,
        "documentation": text,
    }


def _echo_entry(entry: dict[str, Any]) -> None:
    click.echo(f"{entry['name']}\n")
    click.echo(entry["documentation"] + "\n")
    if entry["options"]:
        click.echo("Options and defaults:")
        echo_table([(f"  {option}", str(default)) for option, default in entry["options"].items()])
    else:
        click.echo("No options.")
    click.echo()
    needs = ", ".join({"value": "a value head", "reference": "a reference", "partners": "mismatched completions"}.get(n, n) for n in entry["needs"])
    echo_table([("Data:", entry["data"]), ("One value per:", entry["unit"]), ("Needs:", needs or "nothing else"), ("Source:", entry["source"])])
    click.echo("\nIn a configuration:\n  objective:")
    if entry["name"] == AUXILIARY:
        click.echo("    preset: upo\n    auxiliary:\n      rewards: [{scorer: readability, weight: 1.0}]")
        for option, default in entry["options"].items():
            click.echo(f"      {option}: {default}")
    else:
        shown = "".join(f", {option}: {default}" for option, default in entry["options"].items())
        click.echo(f"    preference: {{loss: {entry['name']}{shown}}}")
