"""What can be refused before a model is loaded: an objective that the rows cannot serve, a schedule under which nothing happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from upo.cache import cache_dir
from upo.config import RunConfig
from upo.data.batch import Example
from upo.data.notes import places, plural
from upo.errors import ConfigError, ModelError
from upo.losses import LOSSES, Loss, Objective
from upo.losses.base import NEEDS
from upo.models import context
from upo.training.metrics import name_rows
from upo.training.reporter import Reporter

# Nats on a completion. Sums in 16 bits move with the shape of the batch.
ROUNDING = {"float32": 1e-2, "bfloat16": 1.0, "float16": 1.0}
KINDS = {"pair": "pairs", "unpaired": "unpaired rows", "group": "scored groups"}


def check_rows(objective: Objective, examples: Sequence[Example], what: str) -> None:
    """Raise ConfigError if a preference loss needs more than the rows bring. `what` names the rows, e.g. "data.train"."""
    for loss in (term.loss for term in objective.preference):
        missing = unserved(type(loss), examples)
        if missing:
            works = [name for name, other in LOSSES.items() if not unserved(other, examples)]
            remedy = f"Losses that work on these rows: {', '.join(works)}." if works else "No preference loss works on them; objective.auxiliary alone does."
            raise ConfigError(f"objective.preference: {loss.name} {missing}; {what} holds {layout(examples)}. {remedy}")
    for column in objective.columns:
        if short := [e.origin for e in examples if column not in e.columns]:
            there = sorted({name for e in examples for name in e.columns})
            known = f"There are: {', '.join(there)}." if there else "The rows have no numeric column."
            raise ConfigError(f'objective.preference: needs the numeric column "{column}", which is missing in {name_rows(short)} of {what}. {known}')
    for need, attribute, field in (("anchors", "anchor", "anchor"), ("quantiles", "ref_rewards", "ref_rewards")):
        if need in objective.needs and (short := [e.origin for e in examples if getattr(e, attribute) is None]):
            loss = next(t.loss for t in objective.preference if need in t.loss.requires())
            raise ConfigError(f'objective.preference: {loss.name} needs {NEEDS[need]}, and there is none in {name_rows(short)} of {what}. Add the field "{field}".')


def unserved(loss: type[Loss], examples: Sequence[Example]) -> str:
    """What the loss misses in the rows, naming the first of them; empty if nothing."""
    if loss.data == "any":
        return ""
    if loss.data == "pairs":
        short = [e.origin for e in examples if e.kind != "pair"]
        return f"compares pairs, and there is none in {name_rows(short)}" if short else ""
    if loss.data == "labels":
        short = [e.origin for e in examples if 0 in e.labels]
        return f"needs a label for each completion, and there is none in {name_rows(short)}" if short else ""
    if loss.data == "chosen":
        return "" if any(v > 0 for e in examples for v in e.labels) else "learns from chosen or desirable completions, and there are none"
    short = [e.origin for e in examples if e.kind != "group" and len(e.completions) < 2]
    return f"compares scored completions of one prompt, and there is one only in {name_rows(short)}" if short else ""


def layout(examples: Sequence[Example]) -> str:
    """`120 pairs`, or `3 pairs and 2 unpaired rows`."""
    counts = Counter(KINDS.get(e.kind, e.kind) for e in examples)
    return " and ".join(f"{n} {kind}" for kind, n in counts.items()) or "no rows"


def check_context(config: Mapping[str, Any], examples: Sequence[Example], reporter: Reporter) -> None:
    """Warn about rows longer than the context that the model (`config`: its config.json) was made for. Nothing is said where its positions are stretched."""
    if (limit := context(config)) is None:
        return
    long = [e.origin for e in examples if len(e.prompt) + max(map(len, e.completions)) > limit]
    if long:
        reporter.warn(
            f"{plural(len(long), 'row')} longer than the {limit} tokens that the model was made for ({places(long)}). Lower train.max_length to {limit}, "
            "or use a model with a longer context."
        )


def check_length(config: RunConfig, objective: Objective, total: int, reporter: Reporter) -> None:
    """Refuse a run in which the actor never switches on; warn about one shorter than its warm-ups."""
    actor = 0 if objective.auxiliary is None else objective.auxiliary.actor_warmup_steps
    longer = "Raise train.epochs or train.steps, or lower"
    if objective.auxiliary is not None and objective.auxiliary.gamma > 0 and actor >= total:
        raise ConfigError(
            f"objective.auxiliary.actor_warmup_steps: the actor stays off for {actor} steps and the run has {total}, "
            f"so the rewards would change nothing. {longer} it."
        )
    if actor * 2 > total:
        reporter.warn(f"The actor is off for {actor} of {total} steps. {longer} objective.auxiliary.actor_warmup_steps.")
    warmup = config.optimizer.warmup_steps
    if warmup >= total:
        reporter.warn(f"The run has {total} steps and the learning rate warms up over {warmup}: it ends before. {longer} optimizer.warmup_steps.")


def check_start(largest: float, dtype: str, reporter: Reporter) -> None:
    """Judge the largest |log-ratio| before the first update of a run whose policy starts as its reference.

    Raises ModelError if the two disagree beyond rounding in float32; warns about 16-bit formats, whose sums move with the shape of the
    batch.
    """
    found = f"step 1: policy and reference differ by {largest:.3g} nats on a completion although nothing was trained yet"
    if dtype == "float32" and largest > ROUNDING[dtype]:
        raise ModelError(
            f"{found}; rounding in float32 explains 0.01. The reference log-probs were computed differently, so every loss would be wrong. "
            f"Remove {cache_dir('reference')} and start again; if that does not help, please report it."
        )
    if largest > ROUNDING[dtype]:
        reporter.warn(f"{found[0].upper()}{found[1:]}, by rounding in {dtype}. With dtype: float32 they agree.")
