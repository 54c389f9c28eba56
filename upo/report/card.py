"""`upo card`: a README for the model hub from what a run folder knows, with nothing of the machine it lay on."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

import upo
from upo.errors import RunError
from upo.report import facts
from upo.report.plain import clean
from upo.report.read import Told
from upo.rewards import SCORERS

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DATASET = re.compile(r"([\w.-]+/[\w.-]+)(:[\w.+-]+)?")
FILES = (".jsonl", ".json", ".ndjson", ".parquet", ".csv")


def base_model(run: Told, given: str | None = None) -> str | None:
    """The hub id of the base: given, or the run's if that is one; None for a folder of this machine."""
    if given is not None and not HUB_ID.fullmatch(given):
        raise RunError(f"--base {given}: not a hub id (owner/name).")
    name = run.config.model if run.config else ""
    return given or (name if HUB_ID.fullmatch(name) and not Path(name).exists() else None)


def card(run: Told, base: str | None = None, license: str | None = None) -> str:
    """The README: YAML front matter, then Markdown. Raises RunError for a run without a result."""
    if not run.finished:
        raise RunError(f"{run.path}: {run.notes[0]} A card tells of a result.")
    name = base_model(run, base)
    front = {
        **({"base_model": name} if name else {}),
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        **({"license": license} if license else {}),
        **({"datasets": hub} if (hub := _datasets(run)) else {}),
        "tags": _tags(run),
    }
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---",
        f"# {_text(run.name)}",
        _summary(run, name),
        _use(run, name),
        "## Training data\n\n" + _data(run),
        "## Objective\n\n" + _objective(run),
        "## Results\n\n" + _results(run),
        "## Limits\n\n" + _limits(run),
        "## How it was made\n\n" + _made(run),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(run: Told, base: str | None) -> str:
    goals = run.evaluation.goals if run.evaluation else {}
    of = f"[{base}](https://huggingface.co/{base})" if base else _text(facts.model_name(run))
    told = " ".join(_text(facts.sentence(name, goal, run)) for name, goal in goals.items())
    return f"A LoRA adapter for {of}, trained with upo, which implements [Unified Preference Optimization](https://arxiv.org/abs/2405.17956). Objective: {_text(facts.objective(run))}." + (f"\n\n{told}" if told else "")


def _use(run: Told, base: str | None) -> str:
    base = base or facts.model_name(run)
    return f"""\
## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = {json.dumps(base)}
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "THIS/REPOSITORY")
tokenizer = AutoTokenizer.from_pretrained(base)
```"""


def _data(run: Told) -> str:
    rows = [
        (split, _text(source) if _is_public(run, split) else "a file of the author's", count, completions, f"`{digest}`")
        for split, source, count, completions, digest in facts.data_rows(run)
    ]
    if not rows:
        return "Not recorded."
    return _table(("split", "source", "rows", "completions", "SHA-256 of the tokenised rows"), rows)


def _objective(run: Told) -> str:
    lines = [f"`{facts.objective(run)}`"]
    for goal in run.config.objective.goals if run.config else ():
        lines.append(f"- **{_text(goal.scorer)}**, weight {goal.weight:g}: {_text(SCORERS[goal.scorer].card.measures)}")
    return "\n".join([lines[0], *([""] if len(lines) > 1 else []), *lines[1:]])


def _results(run: Told) -> str:
    evaluation, rows = run.evaluation, []
    for name, goal in evaluation.goals.items() if evaluation else ():
        measure = goal.measure
        shown = f"{facts.change(measure.change)} ({goal.verdict()[0]})" if measure.change else "no interval"
        rows.append((_text(name), facts.plain_number(measure.before), facts.plain_number(measure.after), shown))
    rows += [(_text(label), before, after, shown) for label, before, after, shown in facts.measures(run)]
    if evaluation and evaluation.win_rate:
        rate = evaluation.win_rate.rate
        shown = "not shown" if rate.direction(0.5) == "not shown" else "shown"
        rows.append((f"win rate against before (judge: {_text(evaluation.win_rate.judge)})", "", f"{rate.mean:.2f}", f"{rate.low:.2f} to {rate.high:.2f} ({shown})"))
    if not rows:
        return "Nothing was measured."
    on = f"Goals on {evaluation.prompts} prompts, {evaluation.samples} sampled answers each, before and after training. " if evaluation and evaluation.prompts else ""
    return (
        _table(("measure", "before", "after", "change"), rows)
        + f"\n\n{on}Intervals are over prompts, for this one training seed; where one includes 0, no change is shown. Figures without an interval are single measurements."
    )


def _limits(run: Told) -> str:
    lines = [
        "An adapter changes how its base answers, not what it knows: the base's errors and biases remain, and its licence and terms apply.",
        "The goals are what their scorers measure, no more: a scorer can be satisfied by text that no reader would prefer.",
    ]
    if not (run.evaluation and run.evaluation.goals):
        lines.append("Whether the goals moved on sampled answers was not measured.")
    lines += [f"The run warned: {_text(facts.portable(run)(warning))}" for warning in run.warnings]
    return "\n".join(f"- {line}" for line in lines)


def _made(run: Told) -> str:
    rows = [(_text(label), _text(value)) for label, value in facts.costs(run)]
    rows += [(f"{_text(label)}, hash", f"`{digest}`") for label, digest in facts.hashes(run)]
    return _table(("", ""), [("steps in all", str(run.done)), *rows]) + f"\n\nThe configuration is in `config.yaml`. Card written by upo {upo.__version__}."


def _tags(run: Told) -> list[str]:
    losses = [p.loss for p in run.config.objective.preference] if run.config else []
    auxiliary = ["unified-preference-optimization"] if run.config and run.config.objective.auxiliary else []
    return ["upo", "lora", "preference-optimization", *auxiliary, *dict.fromkeys(losses)]


def _datasets(run: Told) -> list[str]:
    """Hub ids of the data."""
    if run.config is None:
        return []
    sources = [str(run.config.data.train), str(run.config.data.eval)]
    return list(dict.fromkeys(found[1] for source in sources if _is_hub(source) and (found := DATASET.fullmatch(source))))


def _is_public(run: Told, split: str) -> bool:
    if run.config is None:
        return False
    source = run.config.data.train if split == "training" else run.config.data.eval
    return not isinstance(source, str) or _is_hub(source)


def _is_hub(source: str) -> bool:
    return DATASET.fullmatch(source) is not None and not source.lower().endswith(FILES) and not Path(source).exists()


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def _text(text: str) -> str:
    """Markdown that shows this text and nothing else, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(clean(text).split()))
