"""`upo scorers`: the rewards, read from the classes that compute them."""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import asdict
from typing import Any

import click

from upo.errors import did_you_mean
from upo.losses.options import defaults, ranges
from upo.rewards import SCORERS
from upo_cli.options import echo_json, echo_table, json_option


@click.command()
@click.argument("name", required=False)
@json_option
def scorers(name: str | None, as_json: bool) -> None:
    """List the scorers, or explain the scorer NAME: what it measures, options with their defaults, range, speed, licence.

    A scorer is a goal under objective.auxiliary.rewards, and what `upo score` and `upo data profile` compute.

    \b
    Examples:
      upo scorers
      upo scorers readability
    """
    if name is None:
        entries = [_describe(each) for each in SCORERS]
        if as_json:
            echo_json(entries)
            return
        for entry in entries:
            click.echo(textwrap.fill(entry["card"]["measures"], 100, initial_indent=f"{entry['name']:14}", subsequent_indent=" " * 14))
            click.echo(textwrap.fill(f"Range {entry['range']}; offline: {entry['card']['offline']}.", 100, initial_indent=" " * 14, subsequent_indent=" " * 14))
        click.echo("\nupo scorers NAME shows formula and options.")
        return
    if name.lower() not in SCORERS:
        raise click.UsageError(f'There is no scorer "{name}".{did_you_mean(name, SCORERS)}')
    entry = _describe(name.lower())
    if as_json:
        echo_json(entry)
    else:
        _echo_entry(entry)


def _describe(name: str) -> dict[str, Any]:
    scorer = SCORERS[name]
    return {
        "name": name,
        "card": asdict(scorer.card),
        "range": "any number" if scorer.card.range is None else "{:g} to {:g}".format(*scorer.card.range),
        "options": defaults(scorer),
        "ranges": ranges(scorer),
        "version": scorer.version,
        "documentation": inspect.cleandoc(scorer.__doc__ or ""),
    }


def _echo_entry(entry: dict[str, Any]) -> None:
    click.echo(f"{entry['name']}\n")
    click.echo(entry["documentation"] + "\n")
    if entry["options"]:
        click.echo("Options, defaults and ranges:")
        echo_table([(f"  {option}", str(default) or '""', entry["ranges"][option]) for option, default in entry["options"].items()])
    else:
        click.echo("No options.")
    click.echo()
    card = entry["card"]
    echo_table(
        [("Measures:", card["measures"]), ("Range:", entry["range"]), ("Higher is:", card["higher"]), ("Speed:", card["speed"]),
         ("Licence:", card["licence"]), ("Offline:", card["offline"]), ("Version:", entry["version"])]
    )  # fmt: skip
    shown = "".join(f", {option}: {default}" for option, default in entry["options"].items() if default not in ("", None))
    click.echo(f"\nIn a configuration:\n  objective:\n    auxiliary:\n      rewards: [{{scorer: {entry['name']}{shown}, weight: 1.0}}]")
