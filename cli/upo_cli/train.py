"""`upo train`: one configuration file to one run folder, or on with a run that was stopped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from upo.backend import get_backend
from upo.config import RunConfig, load_config
from upo.training.reporter import Reporter
from upo_cli.options import allow_code_option, backend_option, echo_json, echo_table, json_option, quiet_option, rank
from upo_cli.progress import duration, number, reporting

COMPARED = ("loss", "accuracy", "margin", "kl", "perplexity", "goals", "goal/", "answers/words", "answers/repetition", "logp/chosen", "logp/rejected", "weight/mean")  # of the evaluation, in the final table

TOLD = (("rows", "rows"), ("steps", "steps"), ("total_s", "time"), ("rows_per_s", "rows per second"), ("peak_memory_gb", "peak memory, GB"))


def _print_schema(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted:
        from upo.config_schema import config_schema

        echo_json(config_schema())
        ctx.exit()


@click.command()
@click.argument("config", required=False, type=click.Path(path_type=Path))
@backend_option
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder of the run, new or empty.  [default: runs/NAME-OF-CONFIG]")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a configuration key, e.g. optimizer.lr=1e-5. May be repeated.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out from its newest checkpoint; its own configuration is used if none is named.")
@click.option("--reschedule", is_flag=True, help="With --resume: take a new length or new learning rates (--set, CONFIG) from the checkpoint on.")
@click.option("--dry-run", is_flag=True, help="Say what would happen (rows, tokens, steps, memory) and stop.")
@json_option
@allow_code_option
@quiet_option
@click.option("--schema", is_flag=True, is_eager=True, expose_value=False, callback=_print_schema, help="Print the JSON schema of CONFIG and exit.")
def train(
    config: Path | None,
    backend: str | None,
    out: Path | None,
    overrides: tuple[str, ...],
    resume: bool,
    reschedule: bool,
    dry_run: bool,
    as_json: bool,
    allow_code: bool,
    quiet: bool,
) -> None:
    """Fine-tune as the YAML file CONFIG says; docs/configuration.md lists its keys.

    Paths in CONFIG are relative to the current directory. The folder of the run gets its configuration, metrics, checkpoints and, at
    the end, the adapter. Nothing is overwritten. Ctrl-C saves a checkpoint; --resume goes on from it, with either backend and on any
    machine; docs/moving-runs.md says what may change on the way.

    \b
    Examples:
      upo train my.yaml --dry-run
      upo train my.yaml --out runs/first --set train.steps=20
      upo train --resume --out runs/first
      upo train --resume --out runs/first --set train.epochs=2 --reschedule
      torchrun --nproc-per-node 2 -m upo_cli train my.yaml
      mlx.launch -n 2 -- python -m upo_cli train my.yaml
    """
    if reschedule and not resume:
        raise click.UsageError("--reschedule changes a run that is resumed: add --resume.")
    config, out = _files(config, out, resume)
    run = load_config(config, [*overrides, *([f"backend={backend}"] if backend else [])])
    with reporting(quiet) as reporter:
        _say_ignored(run, resume, reporter)
        if dry_run:
            from upo.training.plan import plan

            result = plan(run, allow_code=allow_code, reporter=reporter)
        else:
            from upo.training.loop import train as run_training

            get_backend(run.backend)  # a missing one is said before the data is read and scored
            reporter.info(f"Run folder: {out}")
            result = run_training(run, out, resume=resume, reschedule=reschedule, allow_code=allow_code, reporter=reporter)
    if rank():
        return
    if as_json:
        echo_json(result)
    elif dry_run:
        echo_table([(name.replace(".", " ").replace("_", " "), _shown(name, value)) for name, value in _flat(result)])
    elif not quiet:
        _echo_result(config, out, result)


def _files(config: Path | None, out: Path | None, resume: bool) -> tuple[Path, Path]:
    """The configuration file and the run's folder."""
    if config is None and not (resume and out):
        raise click.UsageError("Name a configuration file, or go on with a run: upo train --resume --out RUN.")
    if config is not None and config.is_dir():
        raise click.UsageError(f"{config} is a folder, not a configuration file. To go on with the run in it: upo train --resume --out {config}")
    if config is None:
        assert out is not None
        if not (out / "config.yaml").is_file():
            raise click.UsageError(f"{out} holds no run (config.yaml is missing), so there is nothing to resume.")
        return out / "config.yaml", out
    return config, out or Path("runs") / config.stem


def _say_ignored(run: RunConfig, resume: bool, reporter: Reporter) -> None:
    if run.train.steps is not None and "epochs" in run.train.model_fields_set and not resume:
        reporter.info(f"train.steps is given, so the run takes {run.train.steps} steps and train.epochs is not used.")


def _echo_result(config: Path, out: Path, summary: Mapping[str, Any]) -> None:
    evaluation = summary.get("eval") or {}
    before, after = (evaluation.get(when) or {} for when in ("before", "after"))
    there = [name for name in after if name in before]
    names = [name for known in COMPARED for name in there if name == known or (known.endswith("/") and name.startswith(known))]
    if names:
        click.echo("Held-out rows, before and after:")
        echo_table([("", "before", "after")] + [(name, number(before[name], ".4f"), number(after[name], ".4f")) for name in names])
        click.echo()
    told = [(label, _shown(name, summary[name])) for name, label in TOLD if summary.get(name) is not None]
    best = summary.get("best")
    kept = [("best checkpoint", str(out / "checkpoints" / Path(best["checkpoint"]).name))] if best else []
    echo_table([*told, ("adapter", str(out / "adapter")), *kept])
    click.echo("\nNext:")
    click.echo(f'  upo generate {out} --prompt "..."')
    click.echo(f"  upo report {out}    one page to look at, or to show")
    click.echo(f"  upo train {config} --out DIR --set KEY=VALUE    the same with something changed")


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, item in value.items():
        pairs += _flat(item, f"{prefix}{name}.") if isinstance(item, Mapping) else [(prefix + name, item)]
    return pairs


def _shown(name: str, value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and name.endswith("_s") and not name.endswith("per_s"):
        return duration(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
