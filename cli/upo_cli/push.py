"""`upo push`: a result to the model hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from upo_cli.options import echo_json, echo_table, json_option


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--yes", is_flag=True, help="Upload. Without it, only say what would go where.")
@click.option("--public", is_flag=True, help="Make the repository public, or upload to one that is.  [default: private]")
@click.option("--base", metavar="OWNER/NAME", help="Hub id of the base model, where the run names a folder.")
@click.option("--license", metavar="ID", help="Licence of the adapter, for the card.")
@click.option("--metrics", is_flag=True, help="Upload metrics.jsonl as well.")
@json_option
def push(run: Path, repo: str, yes: bool, public: bool, base: str | None, license: str | None, metrics: bool, as_json: bool) -> None:
    """Upload the adapter of RUN with its card and configuration to the model hub. A dry run unless --yes is given.

    The card is README.md in RUN, or made as `upo card` makes it. Data, answers and checkpoints stay here, and paths of this machine are
    taken out of the configuration. It uploads as the account of `hf auth login` or HF_TOKEN.

    \b
    Examples:
      upo push runs/first me/plain-smollm2
      upo push runs/first me/plain-smollm2 --yes
    """
    from upo.report.push import push as send

    done = send(run, repo, upload=yes, public=public, base=base, license=license, metrics=metrics)
    if as_json:
        return echo_json(asdict(done))
    click.echo(f"{'Uploaded' if yes else 'Would upload'} to {done.repo} ({'private' if done.private else 'public'}):")
    echo_table([(f"  {name}", f"{size:,} bytes") for name, size in done.files.items()])
    click.echo(f"\nThe card ({'README.md of the run' if done.written else 'as upo card writes it'}):\n")
    click.echo("".join(f"  {line}\n" for line in done.card.splitlines()), nl=False)
    click.echo(f"\n{done.url}" if yes else "\nNothing was uploaded. To do it, add --yes.")
