"""The `upo` group: finds subcommands by name without importing them, and turns errors into one line and an exit code.

Exit codes: 0 done, 1 an error in the input (`Error: ...` on stderr), 2 wrong usage, 130 interrupted. Any other exception is a bug and
shows its traceback.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
import warnings
from typing import Any

import click

import upo
from upo.errors import UpoError
from upo_cli.cores import choose_waiting
from upo_cli.options import rank

# name: where it is, and its line in `upo --help`. Kept here so that the help imports none of them.
COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("upo_cli.quickstart:quickstart", "Teach a small model plainer language, in a few minutes, with nothing to prepare."),
    "train": ("upo_cli.train:train", "Fine-tune as a configuration file says, or go on with a run."),
    "generate": ("upo_cli.generate:generate", "Let a model, or the result of a run, answer prompts."),
    "eval": ("upo_cli.eval:evaluate", "Compare a model before and after training: preferences, goals, win rate, samples."),
    "sweep": ("upo_cli.sweep:sweep", "Train the points of a grid or list, and show the trade-off between goals and preferences."),
    "report": ("upo_cli.report:report", "Show a run, or compare several, in one HTML file that opens anywhere."),
    "convert": ("upo_cli.convert:convert", "Turn an adapter from one format into another: PEFT, mlx-lm, upo."),
    "merge": ("upo_cli.merge:merge", "Merge an adapter into its base model, for any tool that loads models."),
    "card": ("upo_cli.card:card", "Write a README for the model hub about a run."),
    "push": ("upo_cli.push:push", "Upload the result of a run to the model hub; a dry run unless --yes is given."),
    "data": ("upo_cli.data:data", "Look at preference data before training on it."),
    "score": ("upo_cli.score:score", "Write reward scores into a data file."),
    "scorers": ("upo_cli.scorers:scorers", "List the scorers, or explain one: what it measures, options, licence."),
    "losses": ("upo_cli.losses:losses", "List the losses, or explain one: formula, options, source."),
    "doctor": ("upo_cli.doctor:doctor", "Say what is installed, what is missing, and the command that mends it."),
}

# Faults of the machine that are the user's to mend: no permission, disk full, read-only, quota.
_ENVIRONMENT = {errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EROFS, errno.EDQUOT}


class LazyGroup(click.Group):
    """A group that imports a subcommand when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        word = args[0]
        if word not in COMMANDS and not word.startswith("-"):
            near = difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.5)
            hint = f' Did you mean "{near[0]}"?' if near else f" There are: {', '.join(COMMANDS)}."
            raise click.UsageError(f'No such command "{word}".{hint}', ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UpoError as error:
            raise click.ClickException(_by_rank(str(error))) from error
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(130)
        except OSError as error:
            if error.errno not in _ENVIRONMENT:
                raise
            raise click.ClickException(_by_rank(f"{error.filename}: {error.strerror}" if error.filename else str(error))) from error


def _by_rank(message: str) -> str:
    return f"[rank {rank()}] {message}" if rank() else message


@click.group("upo", cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(upo.__version__, prog_name="upo")
def main() -> None:
    """Preference optimisation of language models with goals of your own, on MLX and on PyTorch.

    \b
    Start here:
      upo doctor                    what this machine can do
      upo quickstart                the whole thing on a small model
      upo train my.yaml             your own run; examples/ holds files to start from
    """
    choose_waiting(os.environ)
    # transformers prints advice about frameworks it did not find; `upo doctor` says that better.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if not sys.warnoptions:  # what a dependency will change one day concerns this program, not the one who runs it
        warnings.simplefilter("ignore", FutureWarning)


if __name__ == "__main__":
    main()
