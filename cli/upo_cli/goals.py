"""What the commands share that score data: goals given on the command line, and the rows of a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from upo.config import RewardConfig
    from upo.data.read import Record
    from upo.data.rows import Row
    from upo.training.reporter import Reporter

Command = TypeVar("Command", bound=Callable[..., Any])
LAYOUTS = ("auto", "preference", "unpaired", "transcript", "group")


def layout_option(command: Command) -> Command:
    """--layout."""
    return click.option("--layout", type=click.Choice(LAYOUTS), default="auto", show_default=True, help="How rows are read.")(command)


def reward_option(command: Command) -> Command:
    """--reward, several times, as `rewards`."""
    return click.option(
        "--reward",
        "rewards",
        multiple=True,
        metavar="SCORER[:OPTION=VALUE,...]",
        help="A scorer, e.g. readability or length:high=80; or as in a configuration: '{scorer: pattern, pattern: \"a, b\"}'. May be repeated.",
    )(command)


def parse_goals(rewards: Sequence[str], option: str = "--reward") -> list[RewardConfig]:
    """Goals from texts like `length:low=10,high=80` or `{scorer: length, low: 10}`, given by this option. Raises ConfigError naming both."""
    from pydantic import ValidationError

    from upo.config import RewardConfig
    from upo.errors import ConfigError

    goals = []
    for reward in rewards:
        try:
            goals.append(RewardConfig.model_validate(parse_mapping(reward, option)))
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"{key}: " for key in first["loc"])
            raise ConfigError(f"{option} {reward}: {where}{first['msg'].removeprefix('Value error, ').rstrip('.')}.") from None
    return goals


def parse_mapping(reward: str, option: str) -> Mapping[str, Any]:
    """`scorer` and its options from either form. Raises ConfigError naming the option of the command and the text."""
    from upo.errors import ConfigError

    if reward.lstrip().startswith("{"):
        import yaml

        try:
            given = yaml.safe_load(reward)
        except yaml.YAMLError:
            given = None
        if not isinstance(given, dict):
            raise ConfigError(f"{option} {reward}: is no YAML mapping like {{scorer: length, high: 80}}.")
        return given
    name, _, rest = reward.partition(":")
    options: dict[str, Any] = {"scorer": name.strip()}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"{option} {reward}: write options as SCORER:OPTION=VALUE, e.g. length:low=10,high=80.")
        options[key.strip()] = value.strip()
    return options


def read_rows(file: str, layout: str, reporter: Reporter) -> tuple[list[Record], list[Row]]:
    """All records of a file, and the rows among them that can be used. Raises DataError if one cannot be read, or none can be used."""
    from upo.data.read import read
    from upo.data.rows import parse_rows
    from upo.errors import DataError

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
        reporter.warn(f"{unscored} of {len(records)} rows cannot be used and stay without scores; `upo data check {file}` says why.")
    return records, parsed.rows
