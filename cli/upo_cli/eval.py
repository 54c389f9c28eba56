"""`upo eval`: what training changed, on held-out rows and on freshly sampled answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from upo_cli.goals import parse_mapping
from upo_cli.options import allow_code_option, backend_option, echo_json, finite, json_option, quiet_option, rank
from upo_cli.progress import reporting

if TYPE_CHECKING:
    from upo.config import RunConfig
    from upo.data.batch import Example
    from upo.data.control import Control
    from upo.evaluation.goals import Goal, Question
    from upo.evaluation.judge import Judge
    from upo.evaluation.target import Target
    from upo.training.reporter import Reporter

ROWS = (("accuracy", "preference accuracy", ".3f"), ("margin", "margin", ".4f"), ("kl", "KL to the reference, nats", ".3f"), ("perplexity", "perplexity on chosen", ".2f"))
STYLE = (("words", "words per answer", ".1f"), ("repetition", "repeated word trigrams", ".1%"), ("empty", "empty answers", "d"))


@click.command("eval")
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("--checkpoint", default="latest", show_default=True, metavar="WHICH", help="Of a run: latest, best (train.keep_best) or step-N.")
@click.option("--model", metavar="M", help="Hub id or folder of the model.  [default: the one the run or adapter names]")
@click.option("--adapter", type=click.Path(path_type=Path), help="Folder of an adapter, instead of RUN.")
@click.option("--data", "rows_file", metavar="FILE", help="Rows to score, instead of the run's held-out ones.")
@click.option("--prompts", "prompts_file", type=click.Path(path_type=Path), metavar="FILE", help="Prompts to answer, instead of those of the held-out rows.")
@click.option("--plain", is_flag=True, help="Give the --prompts as they are, without the chat template: for runs on plain strings.")
@click.option("--goal", "goals", multiple=True, metavar="SCORER[:OPTION=VALUE,...]", help="A scorer of the answers; may be repeated.  [default: the run's goals]")
@click.option("--judge", metavar="JUDGE", help="Win rate by endpoint:url=URL,model=NAME,... (a model compares), SCORER[:OPTION=VALUE,...] (the higher score wins) or python:FILE.py:NAME (a function of prompt and two answers).")
@click.option("--judge-timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds for a verdict of a python judge.  [default: 60]")
@click.option("--limit", type=click.IntRange(min=0), default=64, show_default=True, help="Prompts that are answered, the first ones; 0: none.")
@click.option("--samples", type=click.IntRange(min=1), default=2, show_default=True, help="Answers to each prompt.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Longest answer; a broken-off sentence at its end is not counted.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.7, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-p", type=click.FloatRange(min=0, min_open=True, max=1), default=0.95, show_default=True, help="Nucleus to sample from.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same draws before and after.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Prompts answered at once.")
@backend_option
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="JSON file to write.  [default: RUN/eval.json]")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@json_option
@allow_code_option
@quiet_option
def evaluate(
    run: Path | None,
    checkpoint: str,
    model: str | None,
    adapter: Path | None,
    rows_file: str | None,
    prompts_file: Path | None,
    plain: bool,
    goals: tuple[str, ...],
    judge: str | None,
    judge_timeout: float | None,
    limit: int,
    samples: int,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    batch_size: int,
    backend: str | None,
    out: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    allow_code: bool,
) -> None:
    """Compare RUN with the model it started from; or an --adapter with its --model.

    Held-out rows give preference accuracy and margin, KL to the reference and perplexity; answers sampled to their prompts, with the
    same draws before and after, give the goals, length, repetition and, with --judge, a win rate. Intervals are 95 % bootstraps.

    \b
    Examples:
      upo eval runs/first
      upo eval runs/first --checkpoint best --prompts questions.txt --goal readability --goal length:high=80
      upo eval runs/first --judge python:judge.py:prefer --allow-code
      upo eval runs/first --judge endpoint:url=http://127.0.0.1:8000/v1,model=NAME
      upo eval --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter my-adapter --data pairs.jsonl --out eval.json
    """
    from upo.backend import Sampling, choose, get_backend
    from upo.data.control import Control
    from upo.data.tokenizer import load_tokenizer
    from upo.errors import BackendError
    from upo.evaluation.goals import questions_of
    from upo.evaluation.run import Questions, evaluate_target
    from upo.models import resolve

    out = _out(run, adapter, model, out, force)
    if run is None and checkpoint != "latest":
        raise click.UsageError("--checkpoint chooses one of a run's. For an adapter give --adapter RUN/checkpoints/step-N alone.")
    if plain and prompts_file is None:
        raise click.UsageError("--plain goes with --prompts; held-out rows are asked as they were written.")
    if judge and limit == 0:
        raise click.UsageError("--judge compares answers, and --limit 0 asks for none. Leave one of them out.")
    with reporting(quiet) as reporter:
        target = _target(run, checkpoint, model, adapter, backend, rows_file, reporter)
        scorers, verdicts = _goals(goals, target, allow_code, reporter), _judge(judge, judge_timeout, allow_code, reporter)
        get_backend(target.config.backend)  # a missing one is said before the data is read
        tokenizer = load_tokenizer(resolve(target.config.model, target.config.revision))
        rows = _rows(target, rows_file, prompts_file, tokenizer, reporter)
        control = Control.of(target.config.data.control, tokenizer)
        asked = (_questions(prompts_file, tokenizer, control, plain) if prompts_file else questions_of(rows, limit, control))[:limit]
        if not rows and not asked:
            raise click.UsageError("Nothing to evaluate on: the run has no held-out rows. Give --data FILE (pairs) or --prompts FILE.")
        name = choose(target.config.backend)
        learner = get_backend(target.config.backend).load(target.config)
        if learner.comm.size > 1:
            raise BackendError("upo eval runs as one process. Start it without torchrun or mlx.launch.")
        for note in learner.info.notes:
            reporter.info(note)
        questions = Questions(asked, samples, Sampling(max_tokens, temperature, top_p, seed, batch_size), scorers, verdicts)
        result = evaluate_target(target, learner, tokenizer, name, rows, questions, reporter)
        if out is not None:
            _write(out, result, reporter)
    if rank():
        return
    if as_json:
        echo_json(result)
    else:
        _show(result, run, out)


def _out(run: Path | None, adapter: Path | None, model: str | None, out: Path | None, force: bool) -> Path | None:
    """The file to write, None where there is no place for it."""
    from upo.errors import UpoError

    if run is None and adapter is None and model is None:
        raise click.UsageError("Name a run, an adapter or a model: upo eval RUN, or upo eval --adapter DIR.")
    if run is not None and adapter is not None:
        raise click.UsageError("Give RUN or --adapter, not both.")
    if run is not None and not (run / "config.yaml").is_file():
        raise click.UsageError(f"{run} is no run (it has no config.yaml). For an adapter: --adapter {run}")
    out = out or (None if run is None else run / "eval.json")
    if out is not None and out.exists() and not force:
        raise UpoError(f"--out {out}: exists already. Choose another file with --out, or add --force to replace it.")
    return out


def _target(
    run: Path | None, checkpoint: str, model: str | None, adapter: Path | None, backend: str | None, rows_file: str | None, reporter: Reporter
) -> Target:
    from upo.config import load_config
    from upo.evaluation.target import target_of_model, target_of_run

    overrides: dict[str, Any] = {"backend": backend} if backend else {}
    if run is None:
        return target_of_model(model, adapter, {**overrides, **({"data": {"train": rows_file}} if rows_file else {})})
    if rows_file:
        control = load_config(run / "config.yaml").data.control  # part of how the model is asked
        overrides["data"] = {"train": rows_file, **({"control": control} if control else {})}
    return target_of_run(run, checkpoint, {**overrides, **({"model": model, "revision": None} if model else {})}, reporter)


def _goals(goals: tuple[str, ...], target: Target, allow_code: bool, reporter: Reporter) -> list[Goal]:
    from upo.errors import ConfigError
    from upo.evaluation.goals import Goal, goals_of
    from upo.rewards import TextScorer
    from upo_cli.score import scorers_of

    if not goals:
        return goals_of(target.config, allow_code, reporter)
    found = scorers_of(goals, allow_code, "--goal")
    for label, scorer in found.items():
        if not isinstance(scorer, TextScorer):
            raise ConfigError(f"--goal: {label} stands in the data and cannot score sampled answers. Name a scorer of texts.")
    return [Goal(label, scorer) for label, scorer in found.items()]


def _judge(judge: str | None, timeout: float | None, allow_code: bool, reporter: Reporter) -> Judge | None:
    from upo.errors import ConfigError
    from upo.evaluation.comparison import NAME, Comparison, EndpointJudge
    from upo.evaluation.judge import PythonJudge, ScorerJudge
    from upo_cli.score import scorers_of

    python = judge is not None and judge.startswith("python:") and "=" not in judge
    if timeout is not None and not python:
        raise click.UsageError("--judge-timeout is for --judge python:FILE.py:NAME only; an endpoint has an option, timeout=SECONDS.")
    if judge is None:
        return None
    if python:
        if not allow_code:
            raise ConfigError(f"--judge {judge}: runs code of yours. If you trust it, add --allow-code to the command.")
        return PythonJudge.load(judge.removeprefix("python:"), 60.0 if timeout is None else timeout)
    given = dict(parse_mapping(judge, "--judge"))
    if given.pop("scorer", None) == NAME:
        try:
            return EndpointJudge(Comparison.of(given), reporter)
        except ConfigError as error:
            raise ConfigError(f"--judge {judge}: {error}") from None
    ((_, scorer),) = scorers_of([judge], allow_code, "--judge").items()
    return ScorerJudge(scorer, reporter)


def _rows(target: Target, rows_file: str | None, prompts_file: Path | None, tokenizer: Any, reporter: Reporter) -> list[Example]:
    """The rows to score: all of --data, or the run's held-out ones. Where prompts are given, rows that cannot be had are only a warning."""
    from upo.data.load import load_data
    from upo.errors import DataError

    config: RunConfig = target.config
    if rows_file is None and (target.run is None or not config.data.eval):
        return []
    try:
        data = load_data(config, tokenizer, reporter)
    except DataError as error:
        if rows_file is not None or prompts_file is None:
            raise
        reporter.warn(f"The held-out rows cannot be read, so accuracy, margin, KL and perplexity are left out: {error}")
        return []
    return list(data.eval if rows_file is None else data.train)


def _questions(file: Path, tokenizer: Any, control: Control | None, plain: bool) -> list[Question]:
    from upo.data.text import readable
    from upo.evaluation.goals import Question
    from upo_cli.prompts import conversations, plain_text

    questions = []
    for messages in conversations((), file):
        templated = tokenizer.has_template and not plain
        tokens = tokenizer.prompt_ids(messages if templated else plain_text(messages, f"--prompts {file}"))
        questions.append(Question(control.after(tokens) if control else tokens, readable([dict(turn) for turn in messages])))
    return questions


def _write(out: Path, result: Mapping[str, Any], reporter: Reporter) -> None:
    from upo.errors import RunError
    from upo.training.files import write_text

    replaced = out.exists()
    try:
        write_text(out, json.dumps(finite(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise RunError(f"--out {out}: cannot be written ({error.strerror}).") from None
    reporter.info(f"{'Replaced' if replaced else 'Wrote'} {out}")


def _show(result: Mapping[str, Any], run: Path | None, out: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from upo.evaluation.run import median_sample

    console = Console(highlight=False, soft_wrap=False)
    table = Table(title=Text(f"{result['rows']} held-out rows; {result['prompts']} prompts, {result['samples_per_prompt']} answers to each"))
    for name in ("", "before", "after", "change (95 % interval)"):
        table.add_column(name, justify="right" if name else "left")
    lines = [(label, spec, result[key]) for key, label, spec in ROWS if key in result]
    lines += [(f"goal {name}", ".3f", numbers) for name, numbers in result["goals"].items()]
    lines += [(label, spec, result["answers"][key]) for key, label, spec in STYLE if "answers" in result]
    for label, spec, numbers in lines:
        table.add_row(Text(label), _number(numbers["before"], spec), _number(numbers["after"], spec), _interval(numbers.get("change")))
    console.print(table)
    if rate := result["win_rate"]:
        console.print(Text(_verdict(rate)))
    if result["samples"]:
        sample = median_sample(result["samples"])
        sides = Table(title=Text(sample["prompt"]), show_lines=True)
        sides.add_column("before", ratio=1)
        sides.add_column("after", ratio=1)
        sides.add_row(Text(sample["before"][0]), Text(sample["after"][0]))
        console.print(sides)
        console.print(Text(f"One sample of {len(result['samples'])}, whose length changed by the median.{f' All of them: {out}' if out else ''}"))
    click.echo("\nNext:")
    for line in _next(result, run):
        click.echo(f"  {line}")


def _number(value: float, spec: str) -> str:
    """The number in this format, without the minus sign of a zero."""
    text = format(value, spec)
    return text if any(digit in text for digit in "123456789") else text.removeprefix("-")


def _interval(change: Mapping[str, float] | None) -> str:
    return f"{change['mean']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})" if change else ""


def _verdict(rate: Mapping[str, Any]) -> str:
    counts = f"{rate['wins']} wins, {rate['losses']} losses, {rate['ties']} ties ({rate['inconsistent']} of them as the verdict changed with the order)"
    failed = f"; {rate['failed']} pairs without a verdict left out" if rate["failed"] else ""
    if rate["mean"] is None:
        return f"Win rate by {rate['judge']}: no verdict at all{failed}."
    return f"Win rate by {rate['judge']}: {rate['mean']:.1%} ({rate['low']:.1%} to {rate['high']:.1%}); {counts}{failed}."


def _next(result: Mapping[str, Any], run: Path | None) -> list[str]:
    """What the numbers suggest to try, and commands to go on with."""
    lines = []
    with suppress(KeyError):
        if result["answers"]["repetition"]["after"] > result["answers"]["repetition"]["before"] + 0.1:
            lines.append("The answers repeat themselves more: fewer steps, a lower optimizer.lr, or an earlier checkpoint (--checkpoint step-N).")
        if result["answers"]["empty"]["after"] > result["answers"]["empty"]["before"]:
            lines.append("More answers are empty: a goal may reward saying nothing. Look at them before anything else.")
    unmoved = [name for name, goal in result["goals"].items() if goal["change"]["low"] <= 0 <= goal["change"]["high"]]
    if unmoved:
        lines.append(f"No change is shown of {', '.join(unmoved)}: more prompts (--limit) narrow the interval; objective.auxiliary.gamma strengthens the goals.")
    lines.append(f'upo generate {run} --prompt "..."' if run else 'upo generate --model M --adapter DIR --prompt "..."')
    lines.append("upo sweep SWEEP.yaml --out DIR    other weights, gamma or losses, and their trade-off")
    return lines
