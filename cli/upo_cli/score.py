"""`upo score`: writes what a reward says about each completion into a copy of a data file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from upo_cli.options import allow_code_option, echo_json, echo_table, json_option, quiet_option

if TYPE_CHECKING:
    from upo.data.rows import Row
    from upo.rewards import Scorer


@click.command()
@click.argument("file", type=str)
@click.option(
    "--reward",
    "rewards",
    multiple=True,
    required=True,
    metavar="SCORER[:OPTION=VALUE,...]",
    help="A scorer, e.g. readability or length:high=80. May be repeated.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON lines file to write.")
@click.option(
    "--layout",
    type=click.Choice(["auto", "preference", "unpaired", "transcript", "group"]),
    default="auto",
    show_default=True,
    help="How rows are read.",
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@allow_code_option
@json_option
@quiet_option
def score(
    file: str, rewards: Sequence[str], out: Path, layout: str, force: bool, allow_code: bool, as_json: bool, quiet: bool
) -> None:
    """Score every completion of FILE and write the same rows, with the scores, to OUT.

    Pairs get the columns NAME_chosen and NAME_rejected, groups a list NAME, unpaired rows a number NAME. Train on them with
    {scorer: column, column: NAME}. `upo scorers` lists the scorers and their options.

    Scores are kept as they are found: a run that was stopped goes on when the same command is given again.

    \b
    Examples:
      upo score pairs.jsonl --reward readability --reward length:high=80 --out scored.jsonl
      upo score pairs.jsonl --reward python:function=mine.py:score --allow-code --out scored.jsonl
    """
    from upo_cli.progress import reporting

    _check_out(file, out, force)
    scorers = _scorers(rewards, allow_code)
    from upo.data.read import read
    from upo.data.rows import parse_rows
    from upo.errors import DataError

    with reporting(quiet) as reporter:
        records = list(read(file))
        parsed = parse_rows(records, layout)
        if parsed.errors:
            more = f" ({len(parsed.errors) - 1} more rows have errors: upo data check {file})" if len(parsed.errors) > 1 else ""
            raise DataError(f"{parsed.errors[0]}{more}")
        if not parsed.rows:
            raise DataError(f"{file}: no rows to score.")
        reporter.info(f"{file}: {len(parsed.rows):,} rows, layout {parsed.layout} ({parsed.shape})")
        unscored = len(records) - len(parsed.rows)
        if unscored:
            reporter.warn(
                f"{unscored} of {len(records)} rows cannot be used and were copied without scores; `upo data check {file}` says why."
            )
        summary: dict[str, dict[str, Any]] = {}
        added: dict[str, dict[str, Any]] = {row.origin: {} for row in parsed.rows}
        for label, scorer in scorers.items():
            by_row = _score_rows(parsed.rows, scorer, reporter)
            summary[label] = _summary(parsed.rows, by_row, scorer)
            for row, values in zip(parsed.rows, by_row, strict=True):
                added[row.origin].update(_columns(label, row, values))
        rows = [_merged(origin, record, added.get(origin, {})) for origin, record in records if isinstance(record, Mapping)]
        _write(out, rows)
        reporter.info(f"Wrote {out}")
    if as_json:
        echo_json({"file": file, "out": str(out), "rows": len(parsed.rows), "rewards": summary})
    else:
        echo_table(_table(summary))


def _check_out(file: str, out: Path, force: bool) -> None:
    from upo.errors import UpoError

    if out.suffix not in (".jsonl", ".ndjson"):
        raise UpoError(f"--out {out}: JSON lines are written; give a name that ends in .jsonl.")
    if out.exists() and Path(file).exists() and out.samefile(file):
        raise UpoError(f"--out {out}: is the input file. Choose another name.")
    if out.exists() and not force:
        raise UpoError(f"--out {out}: exists already. Choose another name, or add --force to replace it.")
    if not out.parent.is_dir():
        raise UpoError(f"--out {out}: there is no folder {out.parent}.")


def _scorers(rewards: Sequence[str], allow_code: bool) -> dict[str, Scorer]:
    """Label -> scorer, from texts like `length:low=10,high=80`."""
    from upo.errors import ConfigError
    from upo.rewards import build_scorer, unique_label

    built: dict[str, Scorer] = {}
    for reward in rewards:
        name, _, rest = reward.partition(":")
        options = {}
        for option in filter(None, rest.split(",")):
            key, equals, value = option.partition("=")
            if not equals:
                raise ConfigError(f"--reward {reward}: write options as SCORER:OPTION=VALUE, e.g. length:low=10,high=80.")
            options[key.strip()] = value.strip()
        try:
            scorer = build_scorer(name.strip(), allow_code, **options)
        except ConfigError as error:
            raise ConfigError(f"--reward {reward}: {error}") from None
        built[unique_label(scorer, list(built))] = scorer
    return built


def _score_rows(rows: Sequence[Row], scorer: Scorer, reporter: Any) -> list[list[float]]:
    from upo.rewards.total import row_answers

    values = iter(scorer.score([answer for row in rows for answer in row_answers(row)], reporter))
    return [[next(values) for _ in row.completions] for row in rows]


def _columns(label: str, row: Row, values: Sequence[float]) -> dict[str, Any]:
    if row.kind == "pair":
        return {f"{label}_chosen": values[0], f"{label}_rejected": values[1]}
    return {label: list(values) if row.kind == "group" else values[0]}


def _merged(origin: str, record: Mapping[str, Any], added: Mapping[str, Any]) -> str:
    import json

    from upo.errors import DataError

    for name in added:
        if name in record:
            raise DataError(f'{origin}: the row has a field "{name}" already. Rename or remove it first; nothing was written.')
    try:
        return json.dumps({**record, **added}, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{origin}: a field cannot be written as JSON ({error}). Remove it, or convert it to text or numbers."
        ) from None


def _write(out: Path, rows: Sequence[str]) -> None:
    """The whole file or none of it."""
    import os

    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(row + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def _summary(rows: Sequence[Row], by_row: Sequence[Sequence[float]], scorer: Scorer) -> dict[str, Any]:
    values = [value for row in by_row for value in row]
    pairs = [row_values for row, row_values in zip(rows, by_row, strict=True) if row.kind == "pair"]
    bounded = scorer.card.range == (0.0, 1.0)
    return {
        "completions": len(values),
        "mean": _mean(values),
        "min": min(values),
        "max": max(values),
        "at_0": _mean([value == 0 for value in values]) if bounded else None,
        "at_1": _mean([value == 1 for value in values]) if bounded else None,
        "chosen": _mean([pair[0] for pair in pairs]),
        "rejected": _mean([pair[1] for pair in pairs]),
        "chosen_higher": _mean([pair[0] > pair[1] for pair in pairs]),
        "tied": _mean([pair[0] == pair[1] for pair in pairs]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _table(summary: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    columns = {
        "mean": ".3f",
        "min": ".3f",
        "max": ".3f",
        "at_0": ".0%",
        "at_1": ".0%",
        "chosen": ".3f",
        "rejected": ".3f",
        "chosen_higher": ".0%",
        "tied": ".0%",
    }
    rows = [["reward", *(name.replace("_", " ") for name in columns)]]
    for label, numbers in summary.items():
        rows.append([label, *("-" if numbers[name] is None else format(numbers[name], spec) for name, spec in columns.items())])
    return rows
