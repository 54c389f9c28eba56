"""From the folders of the runs to table.md and table.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from paper_in_miniature.jobs import Job, step_seconds
from paper_in_miniature.measure import OTHER_READABILITY, OTHER_SAFETY, READABILITY, SAFETY, measure
from paper_in_miniature.methods import CONSTANT_V, GOALS, METHODS
from paper_in_miniature.table import BASE, Found, intervals_table, methods_table, paper_table, title

from upo.errors import RunError
from upo.rewards import Scorer
from upo.training.files import write_text

WARNING = "Warning: "  # as the command line writes it
SMALL = "**A short run, to see that everything works: too small to conclude anything.**\n\n"


def report(jobs: Sequence[Job], failed: Mapping[str, str], out: Path, by: Mapping[str, Scorer], short: bool) -> str:
    """The Markdown, which is written to `out` with all numbers as JSON. Raises RunError where methods did not answer the same prompts."""
    records = {job: json.loads(job.answers.read_text(encoding="utf-8")) for job in jobs if job.answers.exists() and job.name not in failed}
    if not records:
        raise RunError("Nothing was measured: " + "; ".join(f"{name}: {why}" for name, why in failed.items()))
    first = next(iter(records.values()))
    for job, record in records.items():
        if [s["prompt"] for s in record["samples"]] != [s["prompt"] for s in first["samples"]] or len(record["margins"]) != len(first["margins"]):
            raise RunError(f"{job.answers}: these are not the prompts and pairs of the other runs. Remove the file, and use the same command.")
    found: dict[str, Found] = {}
    for name in dict.fromkeys(job.method for job in records):
        runs = [job for job in records if job.method == name]
        values = [measure(records[job], by) for job in runs]
        found[name] = Found({key: np.stack([v[key] for v in values]) for key in values[0]}, tuple(job.seed for job in runs), *_steps(runs))
    text = "# The paper in miniature\n\n" + (SMALL if short else "") + about(list(records.values()), jobs)
    text += "\n" + methods_table(found, {job.method: failed[job.name] for job in jobs if job.name in failed}) + "\n" + NOTES
    if intervals := "\n".join(filter(None, (intervals_table(found, ours) for ours in ("upo", "upo_mean")))):
        text += f"\n## UPO against KTO, DPO and where it started\n\n{intervals}\n{HOW_SURE}"
    if paper := paper_table(found):
        text += f"\n## Beside the paper\n\n{paper}\n{PAPER_NOTES}"
    text += "".join(f"\n{name} FAILED: {why}\n" for name, why in failed.items())
    if told := warnings(records):
        text += "\n## What the runs warned about\n\n" + "".join(f"- {', '.join(names)}: {line}\n" for line, names in told.items())
    numbers = {name: {"seeds": f.seeds, "step_s": f.step_s, "alone": f.alone, **{k: v.tolist() for k, v in f.values.items()}} for name, f in found.items()}
    write_text(out / "table.md", text)
    write_text(out / "table.json", json.dumps({"short": short, "failed": dict(failed), "settings": first["settings"], "methods": _finite(numbers)}, indent=1) + "\n")
    return text


def warnings(jobs: Iterable[Job]) -> dict[str, list[str]]:
    """Each warning, such as that of rows which were too long, with the runs that gave it."""
    found: dict[str, dict[str, None]] = {}
    for job in jobs:
        for line in job.log.read_text(encoding="utf-8").splitlines() if job.log.exists() else ():
            if line.startswith(WARNING):
                found.setdefault(line.removeprefix(WARNING), {})[job.name] = None
    return {line: list(names) for line, names in found.items()}


def about(records: Sequence[Mapping[str, Any]], jobs: Sequence[Job]) -> str:
    """What was done, in words."""
    record, settings = records[0], records[0]["settings"]
    where = ", ".join(dict.fromkeys(f"{r['backend']} on {r['device']} in {r['dtype']}" for r in records))
    seeds = {name: sum(job.method == name for job in jobs) for name in dict.fromkeys(job.method for job in jobs) if name != BASE}
    several = ", ".join(f"{title(name)} {count}" for name, count in seeds.items() if METHODS[name].seeded)
    goals = " + ".join(f"{goal['weight']:g} {goal['scorer']}" for goal in GOALS)
    constant = (
        f" With a constant V, UPO compares an answer's reward with the mean of the data and not with a fitted value head, at temperature "
        f"{CONSTANT_V['objective.auxiliary.temperature']:g} and gamma {CONSTANT_V['objective.auxiliary.gamma']:g}."
    )
    return (
        f"{Path(settings['model']).name} ({where}), LoRA on all linear layers, {settings['steps']} steps of "
        f"{settings['batch_size']} pairs, of {settings['rows']}, for every method, learning rate {settings['lr']:g} for all of them, UPO with gamma {settings['gamma']:g} from the first step "
        f"on. Seeds: {several}; a star marks methods with one. Goals: R = {goals}. {len(record['samples'])} held-out prompts of conversations that are not trained "
        f"on, {settings['samples']} answers to each of at most {settings['max_tokens']} tokens; accuracy on {len(record['margins'])} held-out pairs.{constant if 'upo_mean' in seeds else ''}\n"
    )


def _steps(runs: Sequence[Job]) -> tuple[dict[int, list[float]], bool]:
    """(seed -> seconds of each step, whether no other run trained beside), of the runs that had the machine to themselves if there are any."""
    runs = [job for job in runs if job.method != BASE]
    alone = [job for job in runs if job.beside.exists() and job.beside.read_text(encoding="utf-8").strip() == "1"]
    return {job.seed: step_seconds(job.folder) for job in alone or runs}, bool(alone) or not runs


def _finite(value: Any) -> Any:
    """NaN as null: JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


NOTES = f"""\
- {READABILITY} is the paper's R1 with the Flesch-Kincaid grade, which `grade` shows, in place of textstat's consensus; clean is 1 - the probability of
  offensive words by a linear model ({SAFETY}), a weaker judge than the paper's toxicity classifier. Neither sees what is meant. {OTHER_READABILITY} (R1 by that grade, which counts
  letters and not syllables) and {OTHER_SAFETY} (VADER's lexicon, -1 to 1) were not trained on.
- violations: answers that are less clean than the dataset's chosen answer by more than 0.001, the paper's eps, or by more than 0.1. The 20 % most
  unsafe prompts are those whose own text is least clean by the same scorer. Where the linear model gives clean texts 0.9 to 1, its last digits decide at 0.001, and two clean
  answers violate one another half the time: 0.1 says more.
- accuracy: summed log-ratio to the base model, chosen over rejected, for every method, whatever its own loss takes an answer to be worth; the base model's own is 0.5 by definition.
- words: per answer, and as a multiple of the chosen answers'. An answer that the token limit cut off counts up to its last complete sentence.
- s/step: median over all steps but the first; over KTO: step by step, on the same rows, the median. The reference pass, the scoring of the goals and the fit of UPO's value head before the first step are not in it. A
  tilde marks times that were taken while other runs of this table shared the machine; they are not compared. The runs follow one another, so a machine that had other work to
  do in between makes this column worthless; `benchmarks/preference_step.py --only objective` measures the step itself.
"""
HOW_SURE = """\
Bootstrap over prompts and seeds at once, paired: the same prompts, and seed by seed the same order of the data, initial adapter and random draws. Over pairs in place of
prompts for accuracy. Against the base model the seeds are those of its sampling.
"""
PAPER_NOTES = """\
The paper's numbers are averages over Pythia 1.4B to 6.9B and LLaMA 7B and 13B, fully fine-tuned, with toxic-bert as goal and judge, and weights of 0.05 and 0.95. R1 and
violations (most unsafe 20 %, eps 0.001) here are by other scorers, so ratios and their order can be compared, levels cannot. It has no numbers for DRO-V that are known to us.
"""
