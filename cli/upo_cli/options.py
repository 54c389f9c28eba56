"""Options that several commands share, and what all of them ask about the process they run in."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def backend_option(command: Command) -> Command:
    """--backend, None where it is not given."""
    return click.option(
        "--backend", type=click.Choice(["auto", "mlx", "torch"]), help="Framework to compute with. auto: mlx on Apple silicon, torch elsewhere."
    )(command)


def json_option(command: Command) -> Command:
    """--json, as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout; all else goes to stderr.")(command)


def allow_code_option(command: Command) -> Command:
    """--allow-code."""
    return click.option("--allow-code", is_flag=True, help="Allow scorers that are Python code named by the configuration. Only for files you trust.")(
        command
    )


def quiet_option(command: Command) -> Command:
    """--quiet."""
    return click.option("-q", "--quiet", is_flag=True, help="Show warnings and errors only.")(command)


def rank() -> int:
    """Rank of this process in a data-parallel run (torchrun, mlx.launch, mpirun); 0 on its own. Only rank 0 prints."""
    for variable in ("RANK", "MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        if (text := os.environ.get(variable, "")).isdigit():
            return int(text)
    return 0


def echo_json(value: Any) -> None:
    """JSON on stdout; NaN and infinity become null, so that any reader accepts it."""
    click.echo(json.dumps(finite(value), indent=2, ensure_ascii=False, default=str))


def echo_table(rows: Sequence[Sequence[str]], err: bool = False) -> None:
    """Columns aligned with two spaces between them; the last one is as wide as it likes."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows), default=0))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip(), err=err)


def finite(value: Any) -> Any:
    """The value for JSON: NumPy's numbers as Python's, NaN and infinity as None."""
    if hasattr(value, "tolist"):  # a NumPy scalar or array
        value = value.tolist()
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
