"""What a run was, in words and rows of a table: the same facts for the report and for the model card."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from upo.config import PreferenceConfig
from upo.report.evaluation import Goal, Interval
from upo.report.plain import Portable, clean, mapping, number
from upo.report.read import Told
from upo.training.inputs import read_inputs
from upo.training.manifest import cut_sessions, done_by

# label, before-and-after format, for what is measured beside the goals
MEASURES = {
    "accuracy": ("preference accuracy", ".3f"),
    "margin": ("margin of implicit rewards", ".3f"),
    "kl": ("log-ratio to the reference, nats a completion", ".2f"),
    "perplexity": ("perplexity of chosen completions", ".2f"),
    "grade": ("school grade of the text (Flesch-Kincaid)", ".1f"),
    "words": ("words per answer", ".1f"),
    "repetition": ("repeated word trigrams", ".1%"),
    "empty": ("empty answers", ".0f"),
}
HELD_OUT = ("accuracy", "margin", "kl", "perplexity", "loss")  # of the evaluation lines, where no answers were sampled
# of summary.json, see upo.training.metrics.NAMES
WORK = (
    ("tokens_per_s", "tokens per second of the steps", ",.0f"),
    ("shared_tokens", "tokens of prompts that were shared, not computed again", ".1%"),
    ("padding", "padding", ".1%"),
    ("mfu", "share of the device's peak arithmetic", ".1%"),
)
PACE, MEMORY = "rows per second, reference pass included", "peak memory"
PHASES = {"model": "fetching the model", "prepare": "loading and preparing", "answers": "sampling answers", "train": "training", "total": "altogether"}


def portable(run: Told) -> Portable:
    """Cuts the paths this run names to their last part."""
    known = [str(run.path.resolve()), str(Path.home())]
    if run.config is not None:
        config = run.config
        known += [config.model, config.data.train, str(config.data.eval), config.adapter.start or "", *config.references]
    data = mapping(run.manifest.get("data"))
    known += [str(mapping(split).get("source", "")) for split in data.values()] + [str(mapping(run.manifest.get("model")).get("name", ""))]
    return Portable(known)


def config_yaml(run: Told, base: str | None = None) -> str:
    """The configuration with no path of this machine in it; `base` takes the place of the model."""
    shorten = portable(run)
    if run.config is None:
        return shorten(clean(run.config_text))
    data = walk(run.config.model_dump(mode="json"), shorten)
    return yaml.safe_dump({**data, **({"model": base} if base else {})}, sort_keys=False, allow_unicode=True)


def model_name(run: Told) -> str:
    """Hub id or last part of the folder."""
    name = run.config.model if run.config else mapping(run.manifest.get("model")).get("name", "unknown model")
    return portable(run)(clean(str(name)))


def objective(run: Told) -> str:
    """`kto (beta 0.1) + goals 0.3 readability, 0.7 toxicity (gamma 3, temperature 5)`."""
    if run.config is None:
        return "unknown objective"
    chosen = run.config.objective
    parts = [_term(p) for p in chosen.preference]
    goals = ", ".join(goal.scorer if goal.weight == 1 else f"{goal.weight:g} {goal.scorer}" for goal in chosen.goals)
    if chosen.auxiliary is not None:
        parts.append(f"goals {goals} (gamma {chosen.auxiliary.gamma:g}, temperature {chosen.auxiliary.temperature:g})")
    elif goals:
        parts.append(f"rewards {goals}")
    return " + ".join(parts)


def _term(preference: PreferenceConfig) -> str:
    term = preference.term()
    given = {field.name: (getattr(term.loss, field.name), field.default) for field in dataclasses.fields(term.loss)}
    options = [f"{name} {_value(value)}" for name, (value, default) in given.items() if value != default or name == "beta"]
    weight = f"{term.weight:g} " if term.weight != 1 else ""
    return f"{weight}{preference.loss}" + (f" ({', '.join(options)})" if options else "")


def change(interval: Interval, spec: str = ".3f") -> str:
    """`+0.118, 95 % interval +0.069 to +0.165`."""
    return f"{signed(interval.mean, spec)}, 95\u00a0% interval {signed(interval.low, spec)} to {signed(interval.high, spec)}"


def signed(value: float, spec: str = ".3f") -> str:
    """With its sign; minus as it is written in print."""
    return format(value, f"+{spec}").replace("-", "\u2212")


def plain_number(value: float | None, spec: str = ".3f") -> str:
    return "\u2013" if value is None else format(value, spec).replace("-", "\u2212")


def measures(run: Told) -> list[tuple[str, str, str, str]]:
    """(label, before, after, change) of everything that was measured beside the goals."""
    evaluation = run.evaluation
    found = dict(evaluation.measures) if evaluation else {}
    rows = []
    for name, (label, spec) in MEASURES.items():
        if name in found:
            m = found[name]
            rows.append((label, plain_number(m.before, spec), plain_number(m.after, spec), change(m.change, spec) if m.change else ""))
    before, after = run.held_out("before"), run.held_out("after")
    for name in HELD_OUT:
        old, new = number(before.get(name)), number(after.get(name))
        if name not in found and (old is not None or new is not None):
            label, spec = MEASURES.get(name, ("loss on held-out rows", ".4f"))
            rows.append((label, plain_number(old, spec), plain_number(new, spec), ""))
    return rows


def accuracy(run: Told) -> tuple[float | None, float | None]:
    """On held-out pairs, before and after."""
    if run.evaluation and (found := run.evaluation.measures.get("accuracy")) is not None:
        return found.before, found.after
    return number(run.held_out("before").get("accuracy")), number(run.held_out("after").get("accuracy"))


def sentence(name: str, goal: Goal, run: Told) -> str:
    """One line about a goal that claims no more than was measured."""
    measure, evaluation = goal.measure, run.evaluation
    on = f" ({evaluation.prompts} prompts, {evaluation.samples} answers each)" if evaluation and evaluation.prompts and evaluation.samples else ""
    what = f"The goal {name}" if goal.weight else f"The measure {name}"
    aim = "" if goal.weight else " It was measured only: the run was not trained towards it."
    if measure.change is None:
        return f"{what}: {plain_number(measure.before)} before, {plain_number(measure.after)} after{on}; without an interval no change is shown.{aim}"
    shown = measure.change.direction()
    if shown == "not shown":
        return f"No change of {name} is shown: {change(measure.change)}, which includes 0{on}.{aim}"
    wanted = "" if not goal.weight else ", as wanted" if goal.verdict()[1] == "good" else ", which is the wrong way"
    return f"{what} {shown}{wanted}: {change(measure.change)}{on}.{aim}"


def seconds(run: Told) -> list[tuple[str, float]]:
    """(what, seconds), the total last."""
    if run.evaluation and "total" in run.evaluation.seconds:
        return [(PHASES[name], run.evaluation.seconds[name]) for name in PHASES if name in run.evaluation.seconds]
    names = {"reference_s": "reference pass", "train_s": "training", "total_s": "altogether"}
    found = [(label, value) for name, label in names.items() if (value := number(run.summary.get(name))) is not None]
    if found or not run.steps:
        return found
    spent = sum(number(record.get("seconds")) or 0.0 for record in (*run.steps, *run.evals))
    return [("steps and evaluations so far", spent)]


def duration(value: float) -> str:
    """`48 s`, `6 min 48 s`, `2 h 5 min`."""
    whole = round(value)
    if whole < 60:
        return f"{value:.1f} s" if value < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def costs(run: Told) -> list[tuple[str, str]]:
    """(what, how much): time by phase, speed, memory, by whom."""
    rows = [(label, duration(value)) for label, value in seconds(run)]
    if (pace := number(run.summary.get("rows_per_s"))) is not None:
        rows.append((PACE, f"{pace:.2f}"))
    for name, label, spec in WORK:
        if (value := number(run.summary.get(name))) is not None:
            rows.append((label, format(value, spec)))
    tokens = [(number(r.get("tokens_per_s")), number(r.get("seconds"))) for r in run.steps]
    if tokens and all(None not in pair for pair in tokens):
        rows.append(("tokens trained on, prompts counted once", f"{sum(t * s for t, s in tokens if t is not None and s is not None):,.0f}"))
    memory = [m for r in (*run.steps, *run.evals) if (m := number(r.get("peak_memory_gb"))) is not None]
    if memory:
        rows.append((MEMORY, f"{max(memory):.2f} GB"))
    if sessions := run.manifest.get("sessions"):
        manifest = {"sessions": copy.deepcopy(sessions)}
        cut_sessions(manifest, run.done)
        rows.append(("steps", clean(done_by(manifest)) or "none"))
        rows.append(("in", clean(", ".join(dict.fromkeys(f"{s.get('dtype')}, {s.get('ranks', 1)} process{'es' * (s.get('ranks', 1) != 1)}" for s in sessions)))))
    versions = mapping(run.session.get("versions"))
    if versions:
        rows.append(("versions", clean(", ".join(f"{name} {version}" for name, version in versions.items()))))
    return rows


def data_rows(run: Told) -> list[tuple[str, str, str, str, str]]:
    """(split, source, rows, completions, SHA-256) of the data."""
    shorten, identity = portable(run), mapping(run.manifest.get("identity"))
    found = []
    for name, label in (("train", "training"), ("eval", "held out")):
        split = mapping(mapping(run.manifest.get("data")).get(name))
        if not split or not split.get("rows"):
            continue
        source = split.get("source")
        share = number(source)
        shown = f"{share:.0%} of the training prompts" if share is not None else shorten(clean(str(source)))
        found.append((label, shown, _value(split.get("rows")), _value(split.get("completions")), clean(str(identity.get(f"data.{name}", "unknown")))))
    return found


def rewards(run: Told) -> list[str]:
    """How the total reward of the rows' own completions is spread, a line for each split."""
    found = []
    for split, values in read_inputs(run.path).rewards.items():
        if len(values) and np.isfinite(values).all():
            low, high = np.quantile(values, [0.1, 0.9])
            label = {"train": "training", "eval": "held out"}.get(split, clean(split))
            found.append(f"Reward of the completions in the data, {label}: mean {plain_number(float(values.mean()))}, the middle 80 % from {plain_number(float(low))} to {plain_number(float(high))}.")
    return found


def hashes(run: Told) -> list[tuple[str, str]]:
    """(what, hash) of all else the run is made of."""
    names = {"order": "order of the rows", "tokenizer": "tokenizer", "model": "model weights", "rewards": "rewards", "adapter.start": "start adapter"}
    identity = mapping(run.manifest.get("identity"))
    return [(label, clean(str(identity[name]))) for name, label in names.items() if name in identity]


def _value(value: Any) -> str:
    found = number(value)
    return clean(str(value)) if found is None else f"{found:,.0f}" if found == int(found) and abs(found) >= 1 else f"{found:g}"


def walk(value: Any, replace: Portable) -> Any:
    """JSON with every text in it shortened."""
    if isinstance(value, str):
        return replace(value)
    if isinstance(value, dict):
        return {key: walk(item, replace) for key, item in value.items()}
    return [walk(item, replace) for item in value] if isinstance(value, list) else value
