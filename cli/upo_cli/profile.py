"""`upo data profile`: what goals say about a data file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from upo_cli.goals import layout_option, parse_goals, read_rows, reward_option
from upo_cli.options import allow_code_option, echo_json, echo_table, json_option, quiet_option

if TYPE_CHECKING:
    from upo.rewards.profile import GoalProfile, Profile

BAR = 40  # characters of the longest bar


@click.command()
@click.argument("file")
@reward_option
@click.option("--config", "config_file", metavar="YAML", help="Take the goals, with their weights, from a configuration.")
@layout_option
@allow_code_option
@json_option
@quiet_option
@click.pass_context
def profile(
    ctx: click.Context, file: str, rewards: Sequence[str], config_file: str | None, layout: str, allow_code: bool, as_json: bool, quiet: bool
) -> None:
    """Show how goals are spread over FILE, and how they agree with the preference and with one another.

    Goals are those of --reward or --config; without either, every numeric column of the file. Each completion is scored once, and scores are
    remembered for training. A conflict is a pair whose rejected completion is better by the goal. `preference` is the correlation of the
    scores with the label; the correlations between goals are of ranks.

    \b
    Examples:
      upo data profile pairs.jsonl --reward readability --reward length
      upo data profile pairs.jsonl --config run.yaml
    """
    from upo.errors import DataError
    from upo.rewards.normalise import fit
    from upo.rewards.profile import profile as make_profile
    from upo.rewards.total import row_answers, validate_rewards
    from upo_cli.progress import reporting

    if rewards and config_file:
        raise click.UsageError("Give --reward or --config, not both.")
    goals = parse_goals(rewards)
    if config_file:
        from upo.config import load_config

        goals = list(load_config(config_file).objective.goals)
        if not goals:
            raise click.UsageError(f"{config_file} has no goals: neither objective.auxiliary.rewards nor objective.rewards.")
    key = "--reward" if rewards else "rewards"
    validate_rewards(goals, allow_code, key)
    with reporting(quiet) as reporter:
        _, rows = read_rows(file, layout, reporter)
        if not goals:
            columns = sorted(set.intersection(*(set(row.columns) for row in rows)))
            if not columns:
                raise DataError(f"{file}: has no numeric columns. Name goals: --reward readability (`upo scorers` lists them).")
            goals = parse_goals([f"column:column={name}" for name in columns])
        answers = [answer for row in rows for answer in row_answers(row)]
        scores, weights = {}, {}
        for goal, (label, scorer, weight) in zip(goals, validate_rewards(goals, allow_code, key), strict=True):
            raw = scorer.score(answers, reporter)
            scores[label], weights[label] = fit(goal.normalise, goal.clip, raw)(raw), weight
    result = make_profile(rows, scores, weights)
    if as_json:
        echo_json({"file": file, "rows": len(rows), **result.to_json()})
    else:
        _show(result)


def _show(result: Profile) -> None:
    goals = [*result.goals, *([result.total] if result.total else [])]
    table = [["goal", "weight", "mean", "sd", "min", "max", "preference", "agree", "tied", "conflict"]]
    for goal in goals:
        shares = [f"{n / goal.pairs:.0%}" if goal.pairs else "-" for n in (goal.agreeing, goal.tied, goal.conflicts)]
        numbers = [f"{x:.3f}" for x in (goal.mean, goal.deviation, goal.low, goal.high)]
        table.append([goal.label, f"{goal.weight:g}", *numbers, _signed(goal.preference), *shares])
    echo_table(table)
    if len(result.goals) > 1:
        click.echo("\nRank correlation between goals:")
        labels = list(result.between)
        echo_table([["", *labels], *([a, *("" if a == b else _signed(result.between[a][b]) for b in labels)] for a in labels)])
    for goal in goals:
        click.echo(f"\n{goal.label}:")
        for line in _histogram(goal):
            click.echo(line)
        if goal.worst:
            click.echo("  rejected much better: " + ", ".join(f"{origin.rpartition('/')[2]} (by {by:.3g})" for origin, by in goal.worst))
    for warning in result.warnings:
        click.echo(f"\nWarning: {warning}")


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def _histogram(goal: GoalProfile) -> list[str]:
    edges = [f"{edge:.3g}" for edge in goal.edges]
    width, most = max(map(len, edges)), max(goal.counts)
    return [
        f"  {low:>{width}} to {high:>{width}}  {'#' * -(-BAR * count // most):<{BAR}} {count:,}"
        for low, high, count in zip(edges, edges[1:], goal.counts, strict=False)
    ]
