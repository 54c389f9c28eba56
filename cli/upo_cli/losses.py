"""`upo losses`: the loss specification, read from the classes that execute it."""

from __future__ import annotations

import inspect
import itertools
import textwrap
from types import ModuleType
from typing import Any

import click

from upo.errors import did_you_mean
from upo.losses import FAMILIES, LOSSES, Auxiliary
from upo.losses.base import NEEDS
from upo.losses.options import defaults, ranges
from upo_cli.options import echo_json, echo_table, json_option

AUXILIARY = "auxiliary"  # a term of the objective beside the preference losses, not a preference loss
ALIASES = {"upo": AUXILIARY}
DATA = {
    "pairs": "pairs (chosen, rejected)",
    "labels": "completions with a label, or pairs",
    "chosen": "chosen or desirable completions",
    "scored": "several completions of a prompt",
    "any": "any",
}
UNITS = {"chosen": "chosen completion", "group": "prompt"}


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
        for family, group in itertools.groupby(entries, lambda entry: entry["family"]):
            click.echo(textwrap.fill(family, 100))
            for entry in group:
                words = f"Data: {entry['data']}. Needs: {_needs(entry)}. {entry['source']}"
                for first, text in ((entry["name"], entry["summary"]), ("", words)):
                    click.echo(textwrap.fill(text, 100, initial_indent=f"  {first:21}", subsequent_indent=" " * 23, break_on_hyphens=False))
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
    data, unit, needs = ("any", "completion", {"rewards", "value"}) if name == AUXILIARY else (loss.data, loss.unit, loss.needs)
    family = "Goals of your own, on top of any of the losses above" if name == AUXILIARY else next(_title(f) for f in FAMILIES if f.__name__ == loss.__module__)
    return {
        "name": name,
        "family": family,
        "summary": " ".join(text.partition("\n\n")[0].split()),
        "data": DATA[data],
        "unit": UNITS.get(unit, unit),
        "needs": sorted(needs),
        "options": defaults(loss),
        "ranges": ranges(loss),
        "source": loss.source,
        "documentation": text,
    }


def _needs(entry: dict[str, Any]) -> str:
    return ", ".join(NEEDS[need] for need in entry["needs"] if not (need == "reference" and "references" in entry["needs"])) or "nothing else"


def _title(family: ModuleType) -> str:
    return inspect.cleandoc(family.__doc__ or "").partition("\n")[0].rstrip(".")


def _echo_entry(entry: dict[str, Any]) -> None:
    click.echo(f"{entry['name']}\n")
    click.echo(entry["documentation"] + "\n")
    if entry["options"]:
        click.echo("Options, defaults and ranges:")
        echo_table([(f"  {option}", str(default), entry["ranges"][option]) for option, default in entry["options"].items()])
    else:
        click.echo("No options.")
    click.echo()
    echo_table([("Data:", entry["data"]), ("One value per:", entry["unit"]), ("Needs:", _needs(entry)), ("Source:", entry["source"])])
    click.echo("\nIn a configuration:\n  objective:")
    if entry["name"] == AUXILIARY:
        click.echo("    preset: upo\n    auxiliary:\n      rewards: [{scorer: readability, weight: 1.0}]")
        for option, default in entry["options"].items():
            click.echo(f"      {option}: {default}")
    else:
        shown = "".join(f", {option}: {default}" for option, default in entry["options"].items())
        click.echo(f"    preference: {{loss: {entry['name']}{shown}}}")
        if "rewards" in entry["needs"]:
            click.echo("    rewards: [{scorer: column, column: score}]")
    if "control" in entry["needs"]:
        click.echo('  data: {train: preferences.jsonl, control: ["<|good|>", "<|bad|>"]}')
    if "references" in entry["needs"]:
        click.echo("  reference: [base, path/to/adapter]")
