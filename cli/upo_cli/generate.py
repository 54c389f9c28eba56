"""`upo generate`: what a model, or the result of a run, answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from upo.adapters import read_adapter
from upo.backend import Sampling, get_backend
from upo.config import RunConfig, load_config
from upo_cli.options import backend_option, json_option, quiet_option, rank
from upo_cli.progress import reporting
from upo_cli.prompts import conversations, plain_text

DEFAULTS = Sampling()


@click.command()
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("--model", metavar="M", help="Hub id or folder of the model.  [default: the run's]")
@click.option("--adapter", type=click.Path(path_type=Path), help="Folder of an adapter, a run or a checkpoint to put on the model.")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="A prompt. May be repeated.")
@click.option("--file", "file", type=click.Path(path_type=Path), help="Prompts: a text file, one a line, or JSON lines with prompt or messages.")
@click.option("--system", metavar="TEXT", help="System message before every prompt.")
@click.option("--plain", is_flag=True, help="Give the prompt as it is, without the chat template: for runs on plain strings.")
@backend_option
@click.option("--max-tokens", type=click.IntRange(min=1), default=DEFAULTS.max_tokens, show_default=True, help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(min=0), default=DEFAULTS.temperature, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-p", type=click.FloatRange(min=0, min_open=True, max=1), default=DEFAULTS.top_p, show_default=True, help="Nucleus to sample from.")
@click.option("--seed", type=click.IntRange(min=0), default=DEFAULTS.seed, show_default=True, help="Same seed, same backend: same text.")
@click.option("--batch-size", type=click.IntRange(min=1), default=DEFAULTS.batch_size, show_default=True, help="Prompts answered at once.")
@json_option
@quiet_option
def generate(
    run: Path | None,
    model: str | None,
    adapter: Path | None,
    prompts: tuple[str, ...],
    file: Path | None,
    system: str | None,
    plain: bool,
    backend: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    batch_size: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Answer prompts with the result of RUN, or with --model and, if given, --adapter.

    Prompts come from --prompt, --file or standard input. With --json, one object a line: prompt, completion, tokens.

    \b
    Examples:
      upo generate runs/first --prompt "Why is the sky blue?"
      upo generate --model HuggingFaceTB/SmolLM2-135M-Instruct --prompt "Why is the sky blue?"
      upo generate runs/first --file prompts.jsonl --json > answers.jsonl
    """
    config = _configuration(run, model, adapter, backend)
    asked = conversations(prompts, file, system)
    from upo.data.control import Control
    from upo.data.tokenizer import load_tokenizer
    from upo.models import context, model_config, resolve

    with reporting(quiet) as reporter:
        folder = resolve(config.model, config.revision)
        tokenizer = load_tokenizer(folder)
        if not plain and not tokenizer.has_template:
            plain = True
            reporter.info(f"{config.model} has no chat template: prompts are given as they are.")
        ids = [tokenizer.prompt_ids(plain_text(messages) if plain else messages) for messages in asked]
        if control := Control.of(config.data.control, tokenizer):
            ids = [control.after(tokens) for tokens in ids]
            reporter.info(f"Asked for answers behind {(config.data.control or ('',))[0]} (data.control).")
        limit = context(model_config(folder)[0])
        if limit is not None and (longest := max(map(len, ids))) + max_tokens > limit:
            remedy = f"Lower --max-tokens to {limit - longest}" if longest < limit else "Shorten the prompt"
            reporter.warn(f"A prompt of {longest} tokens and --max-tokens {max_tokens} may go beyond the {limit} tokens that the model was made for. {remedy}, or use a model with a longer context.")
        learner = get_backend(config.backend).load(config)
        for note in learner.info.notes:
            reporter.info(note)
        answers: list[Any] = []
        reporter.start("generate", len(ids), "prompts")
        for start in range(0, len(ids), batch_size):
            part = ids[start : start + batch_size]
            # A seed of its own for every part, else the parts would repeat one another's draws.
            answers += learner.generate(part, Sampling(max_tokens, temperature, top_p, seed + start, batch_size))
            reporter.advance(len(part))
    if rank():
        return
    for number, (messages, tokens) in enumerate(zip(asked, answers, strict=True)):
        prompt, completion = messages[-1]["content"], tokenizer.decode(tokens)
        if as_json:
            click.echo(json.dumps({"prompt": prompt, "completion": completion, "tokens": len(tokens)}, ensure_ascii=False))
        elif len(answers) == 1:
            click.echo(completion)
        else:
            click.echo(("\n" if number else "") + f"### {prompt}\n{completion}")


def _configuration(run: Path | None, model: str | None, adapter: Path | None, backend: str | None) -> RunConfig:
    """What the backend loads: the run's configuration, or the model's alone; the adapter as the start adapter."""
    data: dict[str, Any] = {}
    if run is not None:
        if not (run / "config.yaml").is_file():
            raise click.UsageError(f"{run} is no run (it has no config.yaml). For a model: --model {run}")
        trained = load_config(run / "config.yaml")
        data = trained.model_dump(include={"model", "revision", "backend", "device", "dtype", "quantize"})
        adapter = adapter or run
        if trained.data.control is not None:  # what the model was taught to answer behind
            data |= {"objective": {"preference": "csft"}, "data": {"control": trained.data.control}}
    if model is not None:
        data |= {"model": model, "revision": None}
    if backend is not None:
        data["backend"] = backend
    if "model" not in data:
        raise click.UsageError("Name a run or a model: upo generate RUN, or upo generate --model M.")
    data["data"] = {"train": "-", **data.get("data", {})}  # a configuration names rows; nothing reads them here
    if adapter is not None:
        found = read_adapter(adapter)
        data["adapter"] = {"start": str(adapter), "rank": found.rank, "alpha": found.scale * found.rank}
    return load_config(data)
