"""`upo score`: writes what a reward says about each completion into a copy of a data file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from upo_cli.goals import layout_option, parse_goals, read_rows, reward_option
from upo_cli.options import allow_code_option, echo_json, echo_table, json_option, quiet_option

if TYPE_CHECKING:
    from upo.data.rows import Row
    from upo.rewards import Scorer


@click.command()
@click.argument("file", type=str)
@reward_option
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON lines file to write.")
@layout_option
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

    if not rewards:
        raise click.UsageError("Name at least one scorer: --reward readability. `upo scorers` lists them.")
    _check_out(file, out, force)
    scorers = scorers_of(rewards, allow_code)
    with reporting(quiet) as reporter:
        records, used = read_rows(file, layout, reporter)
        summary: dict[str, dict[str, Any]] = {}
        added: dict[str, dict[str, Any]] = {row.origin: {} for row in used}
        for label, scorer in scorers.items():
            by_row = _score_rows(used, scorer, reporter)
            summary[label] = _summary(used, by_row, scorer)
            for row, values in zip(used, by_row, strict=True):
                added[row.origin].update(_columns(label, row, values))
        rows = [_merged(origin, record, added.get(origin, {})) for origin, record in records if isinstance(record, Mapping)]
        _write(out, rows)
        reporter.info(f"Wrote {out}")
    if as_json:
        echo_json({"file": file, "out": str(out), "rows": len(used), "rewards": summary})
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


def scorers_of(rewards: Sequence[str], allow_code: bool, option: str = "--reward") -> dict[str, Scorer]:
    """Label -> scorer, from texts like `length:low=10,high=80`, given by this option of the command."""
    from upo.errors import ConfigError
    from upo.rewards import build_scorer, unique_label

    built: dict[str, Scorer] = {}
    for reward, goal in zip(rewards, parse_goals(rewards, option), strict=True):
        if given := goal.model_fields_set & {"weight", "normalise", "clip"}:
            raise ConfigError(f"{option} {reward}: {', '.join(sorted(given))} belongs to training; scores are written as the scorer gives them.")
        try:
            scorer = build_scorer(goal.scorer, allow_code, **(goal.model_extra or {}))
        except ConfigError as error:
            raise ConfigError(f"{option} {reward}: {error}") from None
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
