"""Writes docs/configuration.md, docs/cli.md, docs/metrics.md, docs/scorers.md, docs/losses.md and its pictures from the code: `python docs/generate.py`. A test keeps them in step."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import typing
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from upo_cli.main import COMMANDS, main

from upo.config import PRESETS, RunConfig
from upo.config_file import walk
from upo.losses import FAMILIES, LOSSES, Auxiliary
from upo.losses.base import NEEDS
from upo.losses.options import defaults, ranges
from upo.rewards import SCORERS, Scorer
from upo.training.metrics import NAMES

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))
from plots import picture  # noqa: E402

BOUNDS = (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most"))

CONFIGURATION = """\
# Configuration

<!-- Made by docs/generate.py from upo/config.py: change it there. -->

A run is one YAML file: `upo train run.yaml`. The same file runs on either backend. `examples/` holds files to start from.

- Only `model` and `data.train` are required.
- **Paths are relative to the current directory**, not to the file.
- `--set KEY=VALUE` changes a key for one run: `--set optimizer.lr=1e-5`, `--set objective.preference.beta=0.2` (with its number where the file has a list
  of several, from 0: `objective.preference.1.beta`), `--set "objective.preference={loss: kto}"`. The value is read as YAML.
- An unknown key, a key given twice and a value out of its range are errors that name file, line and key. Nothing is ignored.
- Numbers may be written `1e-5`, which YAML 1.1 reads as text.
- `objective.preference` takes one loss, its name alone, or a list: `preference: dpo`, `preference: {loss: dpo, beta: 0.2}`,
  `preference: [{loss: dpo}, {loss: sft, weight: 0.1}]`. `objective.auxiliary.rewards` likewise.
- For completion in an editor: `upo train --schema > upo.schema.json`, and on top of the file `# yaml-language-server: $schema=upo.schema.json`.

In Python: `from upo import load_config, train; train(load_config("run.yaml", ["train.seed=1"]), "runs/one")`.
"""

METRICS = """\
# Numbers of a run

<!-- Made by docs/generate.py from upo/training/metrics.py: change it there. -->

`metrics.jsonl` has a line for each optimizer step and one for each evaluation, with what applies of these:

| name | what it is |
|---|---|
%s

A number that is not finite is `null`. `summary.json` has the total of `slots`, `padding` and `shared_tokens` of all steps together, and `tokens_per_s` and `mfu` over the seconds
of the steps. They are made of the lines of `metrics.jsonl`, which a resumed run cuts to its checkpoint, so each step counts once, whatever backend, device or
`train.micro_batch_tokens` it was done with. `reference_s` and `total_s` count what was spent, lost steps included.

What a step needs (`upo/flops.py`): 2 operations for each weight and token forward and, as the base is frozen, 2 more backward; 6 in all for weights of the adapter; 12 times heads
times size of a head, in each layer, for each pair of tokens that attention joins; 4 for each weight of the head and each completion token. Peaks are those of makers' data sheets for
dense products. There is none for CPUs.
"""

COMMAND_LINE = """\
# Command line

<!-- Made by docs/generate.py from the commands' own help: change it there. -->

`upo` and `python -m upo_cli` are the same. Results go to stdout, progress and messages to stderr; `--json` makes the result one for scripts.

Exit codes: 0 done; 1 an error in the input, told in one line; 2 wrong usage; 130 interrupted. A traceback is a bug of this program: please report it.
"""


LOSS_PAGE = """\
# Losses

<!-- Made by docs/generate.py from the docstrings in upo/losses: change them there. -->

Every loss is one class in `upo/losses`, written once and run by NumPy, PyTorch and MLX. `upo losses NAME` shows the same text. To add one: [adding-a-loss.md](adding-a-loss.md).

Notation: log pi and log ref are summed over a completion's tokens, |y| is their number; g(y) = log pi(y|x) - log ref(y|x); D = g(y_w) - g(y_l) with the chosen
y_w and the rejected y_l; s is the sigmoid; R is the total reward of the goals. A term is the mean of its values over the optimizer step, whatever the
micro-batches and ranks. Any of them may be mixed (`preference: [{loss: dpo, weight: 0.8}, {loss: sft}]`), have its values weighted by a numeric column of the rows
(`weight_column`, where a value belongs to one row), and carry UPO's auxiliary term.

The pictures show one pair, 50 tokens each, as its chosen completion gains and its rejected one loses: the loss (solid, left numbers) and its slope (dashed, right
numbers) against the margin D in nats, with default options.
"""

SCORER_PAGE = """\
# Scorers

<!-- Made by docs/generate.py from the docstrings in upo/rewards: change them there. -->

A scorer gives an answer a number. As a goal of training (`objective.auxiliary.rewards`) the numbers are weighted and added up, once, before training;
`upo score` writes them into a file, `upo data profile` shows what they say about it. `upo scorers NAME` shows the text below. Higher is better; a negative
`weight` turns a goal round.

- **Scored once.** Each distinct answer is scored in batches, in parallel where there is enough to do, and kept in `~/.cache/upo/rewards` (or `UPO_CACHE`) under scorer,
  version, options and, for models, weights. A run that was killed goes on where it stopped. Of several ranks on one machine one scores. A
  `python` function is kept only if you say so (`remember`).
- **Normalised explicitly.** `normalise: zscore` or `quantile`, and `clip: [low, high]` after it, are fitted on the training rows, used for the held-out rows
  as well, and saved in the run's `manifest.json` with the scorer's version and options.
- **Nothing passes for a score that is none.** A scorer that raises, returns NaN, text or the wrong number of values, crashes or takes too long stops with one line that
  names the row and says what is kept; one that gives the same answer different scores is named.

```yaml
objective:
  preset: upo
  auxiliary:
    rewards:
      - {scorer: readability, weight: 0.3}
      - {scorer: toxicity, weight: 0.7}
      - {scorer: reward_model, model: OWNER/NAME, normalise: zscore, clip: [-3, 3], weight: 0.5}
```

An example of your own function, in `my_rewards.py`, used as `{scorer: python, function: "my_rewards.py:polite"}` with `--allow-code`:

```python
def polite(prompts, completions):
    return [float("please" in c.lower()) for c in completions]
```
"""


def scorer_page() -> str:
    """docs/scorers.md: every scorer with its card and options."""
    lines = ["| scorer | measures | range | offline |", "|---|---|---|---|"]
    for name, scorer in SCORERS.items():
        lines.append(f"| [`{name}`](#{name}) | {scorer.card.measures} | {_range(scorer)} | {scorer.card.offline} |")
    return "\n".join([SCORER_PAGE, *lines, "", *map(_scorer, SCORERS)])


def _scorer(name: str) -> str:
    scorer = SCORERS[name]
    card = scorer.card
    rows = [f"| {key} | {value} |" for key, value in (("range", _range(scorer)), ("higher is", card.higher), ("speed", card.speed), ("licence", card.licence))]
    table = "\n".join(["| | |", "|---|---|", *rows, f"| offline | {card.offline} |"])
    return f"## {name}\n\n{card.measures}\n\n{inspect.cleandoc(scorer.__doc__ or '')}\n\n{_options(scorer)}\n{table}\n"


def _range(scorer: type[Scorer]) -> str:
    return "any number" if scorer.card.range is None else "{:g} to {:g}".format(*scorer.card.range)


def loss_page() -> str:
    """docs/losses.md: every family with its pictures, every loss with its formula, options and source."""
    parts = [LOSS_PAGE, _loss_table()]
    for family in FAMILIES:
        title, _, _ = inspect.cleandoc(family.__doc__ or "").partition("\n")
        parts.append(f"## {title.rstrip('.')}\n")
        if pairs := pair_losses(family):
            names = ", ".join(pairs)
            parts.append(f"![{names}]({plot_name(family)})\n")
        parts += [_loss(name) for name in members(family)]
    parts.append("## The auxiliary term\n\n" + inspect.cleandoc(Auxiliary.__doc__ or "") + "\n\n" + _options(Auxiliary) + f"\nSource: {Auxiliary.source}\n")
    return "\n".join(parts)


def members(family: Any) -> list[str]:
    """Names of a family's losses."""
    return [name for name, loss in LOSSES.items() if loss.__module__ == family.__name__]


def pair_losses(family: Any) -> list[str]:
    """Those with one value per pair."""
    return [name for name in members(family) if LOSSES[name].unit == "pair"]


def plot_name(family: Any) -> str:
    return f"plots/{family.__name__.rpartition('.')[2]}.svg"


def _loss_table() -> str:
    lines = ["| loss | data | needs | what it does |", "|---|---|---|---|"]
    for name, loss in LOSSES.items():
        summary, _, _ = inspect.cleandoc(loss.__doc__ or "").partition("\n\n")
        lines.append(f"| [`{name}`](#{name}) | {loss.data} | {', '.join(sorted(loss.needs)) or 'nothing else'} | {' '.join(summary.split())} |")
    return "\n".join(lines) + "\n"


def _loss(name: str) -> str:
    loss = LOSSES[name]
    needs = ", ".join(NEEDS[need] for need in sorted(loss.needs)) or "nothing else"
    unit = {"chosen": "chosen completion"}.get(loss.unit, loss.unit)
    whole = " Its values depend on the whole optimizer step, which is scored once without gradient first." if loss.coupled else ""
    return f"### {name}\n\n{inspect.cleandoc(loss.__doc__ or '')}\n\n{_options(loss)}\nOne value per {unit}. Needs {needs}.{whole}\n\nSource: {loss.source}\n"


def _options(loss: type) -> str:
    if not defaults(loss):
        return "No options.\n"
    allowed = ranges(loss)
    rows = [f"| `{option}` | `{default}` | {allowed[option]} |" for option, default in defaults(loss).items()]
    return "\n".join(["| option | default | range |", "|---|---|---|", *rows]) + "\n"


def configuration() -> str:
    """docs/configuration.md: a table for every section."""
    parts = [CONFIGURATION, _table("", RunConfig)]
    for keys, _, section in walk(RunConfig):
        if section is not None:
            parts.append(f"## {'.'.join(keys)}\n\n{inspect.cleandoc(section.__doc__ or '')}\n\n" + _table(".".join(keys), section))
            if keys == ("objective",):
                parts.append(_presets())
            if keys == ("objective", "preference"):
                parts.append(_kinds("loss", LOSSES, "Options of the losses (formulas: `upo losses NAME`):"))
            if keys == ("objective", "auxiliary", "rewards"):
                parts.append(_kinds("scorer", SCORERS, "Options of the scorers ([scorers.md](scorers.md), `upo scorers NAME`):"))
    return "\n".join(parts)


def command_line() -> str:
    """docs/cli.md: the help of every command."""
    parts = [COMMAND_LINE, _help([])]
    context = click.Context(main, info_name="upo")
    for name in COMMANDS:
        command = main.get_command(context, name)
        parts.append(f"## upo {name}\n\n" + _help([name]))
        if isinstance(command, click.Group):
            parts += [f"### upo {name} {inner}\n\n" + _help([name, inner]) for inner in command.list_commands(context)]
    return "\n".join(parts)


def _table(prefix: str, section: type[BaseModel]) -> str:
    lines = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for name, info in section.model_fields.items():
        key = f"{prefix}.{name}" if prefix else name
        meaning = str(info.description).replace("|", "\\|")
        lines.append(f"| `{key}` | {_default(info)} | {_values(info)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    if info.default_factory is not None or isinstance(info.default, BaseModel) or info.default == ():
        return ""
    return f"`{json.dumps(info.default)}`" if not isinstance(info.default, str) else f"`{info.default}`"


def _values(info: FieldInfo) -> str:
    return f"{' or '.join(_words(info.annotation))}{_bounds(info.metadata)}"


def _words(kind: Any) -> list[str]:
    """A type in words, one for each alternative."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return [", ".join(f"`{value}`" for value in inner)]
    if origin is typing.Annotated:
        return [word + "".join(_bounds(field.metadata) for field in inner[1:]).replace(",", "", 1) for word in _words(inner[0])]
    if origin is tuple:
        of = " or ".join(_words(inner[0]))
        return [f"list of {of}".replace("section", "sections") if inner[-1] is Ellipsis else f"two {of}s"]
    if inner:
        return [word for each in inner for word in _words(each)]
    return [{str: "text", int: "whole number", float: "number", bool: "true, false", type(None): "null"}.get(kind, "section")]


def _bounds(rules: Iterable[Any]) -> str:
    found = [f"{word} {getattr(rule, name):g}" for rule in rules for name, word in BOUNDS if hasattr(rule, name)]
    return f", {' and '.join(found)}" if found else ""


def _presets() -> str:
    lines = ["What a preset fills in where the file gives nothing:", "", "| preset | preference | auxiliary |", "|---|---|---|"]
    for name, preset in PRESETS.items():
        given = ", ".join(f"{key}: {value}" for key, value in preset["auxiliary"].items()) or "the defaults"
        preference = ", ".join(f"{key}: {value}" for key, value in preset["preference"].items())
        lines.append(f"| `{name}` | {preference} | {given} |")
    return "\n".join(lines) + "\n"


def _kinds(title: str, classes: Mapping[str, Any], text: str) -> str:
    lines = [text, "", f"| {title} | options and defaults | what it does |", "|---|---|---|"]
    for name, kind in classes.items():
        options = ", ".join(f"`{f.name}: {f.default}`" for f in dataclasses.fields(kind)) or "none"
        lines.append(f"| `{name}` | {options} | {' '.join(inspect.cleandoc(kind.__doc__ or '').partition(chr(10) * 2)[0].split())} |")
    return "\n".join(lines) + "\n"


def _help(arguments: list[str]) -> str:
    result: Any = CliRunner().invoke(main, [*arguments, "--help"], terminal_width=100, catch_exceptions=False)
    return "```\n" + result.stdout.rstrip() + "\n```\n"


def metrics() -> str:
    return METRICS % "\n".join(f"| `{name}` | {text} |" for name, text in NAMES.items())


PAGES = {"configuration.md": configuration, "cli.md": command_line, "metrics.md": metrics, "scorers.md": scorer_page, "losses.md": loss_page}
PAGES |= {plot_name(family): partial(picture, pair_losses(family)) for family in FAMILIES if pair_losses(family)}

if __name__ == "__main__":
    (DOCS / "plots").mkdir(exist_ok=True)
    for file, make in PAGES.items():
        (DOCS / file).write_text(make(), encoding="utf-8")
        print(f"wrote {DOCS / file}")
