"""`upo report`: one HTML file about one run or several, that needs nothing but itself: no script, no address, a policy that forbids both."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import upo
from upo.errors import RunError
from upo.report import facts, figures, seeds
from upo.report.evaluation import Goal
from upo.report.plain import clean, mapping
from upo.report.read import Told, read_run
from upo.training.files import check_writable, write_text, writing
from upo.training.identity import flatten

HERE = Path(__file__).parent
MARK = '<meta name="generator" content="upo'  # of a file that may be made anew
SHOWN, MOST_ANSWERS = 5, 100  # prompts whose answers are in sight, and in the page at all


@dataclass(frozen=True)
class Written:
    """What `write_report` did."""

    out: Path
    replaced: bool  # an earlier report
    notes: list[str]  # about runs that are unfinished or damaged


def write_report(folders: Sequence[Path], out: Path, force: bool = False) -> Written:
    """Write a report on these runs. Raises RunError: a folder without a run, a file in the way that is no report (unless `force`)."""
    runs = [read_run(Path(folder)) for folder in folders]
    replaced = out.exists()
    if replaced and not force and not _is_report(out):
        raise RunError(f"--out {out}: exists and is no report of upo. Name another file, or add --force to replace it.")
    check_writable(out.parent, "--out: folder")
    with writing(out, "Name another place with --out."):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, render(runs))
    return Written(out, replaced, [f"{run.path}: {note}" for run in runs for note in run.notes])


def render(runs: Sequence[Told], now: datetime | None = None) -> str:
    """The page."""
    style = (HERE / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    views = [_view(run, i, len(runs)) for i, run in enumerate(runs)]
    text = _template().render(
        title=", ".join(view["name"] for view in views),
        version=upo.__version__,
        made=(now or datetime.now(timezone.utc)).strftime("%Y-%m-%d %H:%M UTC"),
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        style=Markup(style),
        runs=views,
        several=len(runs) > 1,
        pools=[_pooled(pool) for pool in seeds.pools(runs)],
        goals=figures.goals(runs),
        measures=_measures(runs),
        tradeoffs=figures.tradeoffs(runs),
        curves=figures.curves(runs),
        answers=_answers(runs),
        data=_data(runs, views),
        costs=_costs(runs),
        shown=SHOWN,
        differing=_differing(runs),
    )
    return text + "\n"


@functools.cache
def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(HERE)
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True).get_template("page.html")


def _view(run: Told, index: int, count: int) -> dict[str, Any]:
    """What the template shows of a run."""
    key = figures.key(index)
    shorten = facts.portable(run)
    goals = run.evaluation.goals if run.evaluation else {}
    spent = facts.seconds(run)
    before, after = facts.accuracy(run)
    costs = dict(facts.costs(run))
    return {
        "key": key,
        "colour": figures.colour(index),
        "name": run.name,
        "path": shorten(clean(str(run.path))),
        "model": facts.model_name(run),
        "objective": facts.objective(run),
        "steps": f"{run.done} of {run.total}" if run.total and run.done != run.total else str(run.done),
        "early": clean(str(mapping(run.summary.get("ended_early")).get("metric", ""))),
        "by": clean(f"{run.session.get('backend')} on {run.session.get('device')}") if run.session else "",
        "created": clean(str(run.manifest.get("created", "")))[:10],
        "finished": run.finished,
        "notes": [shorten(note) for note in run.notes],
        "warnings": [shorten(warning) for warning in run.warnings],
        "goals": [
            {
                "name": name,
                "sentence": facts.sentence(name, goal, run),
                "mean": facts.signed(goal.measure.change.mean) if goal.measure.change else "\u2013",
                "interval": f"{facts.signed(goal.measure.change.low)} to {facts.signed(goal.measure.change.high)}" if goal.measure.change else "",
                "before": facts.plain_number(goal.measure.before),
                "after": facts.plain_number(goal.measure.after),
                "weight": f"{goal.weight:g}" if goal.weight else "measured only",
                "verdict": goal.verdict()[0],
                "tone": goal.verdict()[1],
            }
            for name, goal in goals.items()
        ],
        "win": _win(run),
        "accuracy": None if after is None else (facts.plain_number(before, ".2f"), facts.plain_number(after, ".2f")),
        "accuracy_change": _accuracy_change(run),
        "pairs": _eval_rows(run),
        "time": facts.duration(spent[-1][1]) if spent else None,
        "pace": f"{costs[facts.PACE]} rows a second" if facts.PACE in costs else None,
        "memory": costs.get(facts.MEMORY),
        "hashes": facts.hashes(run),
        "config": facts.config_yaml(run),
        "folder": f"runs/{run.name}" if run.path.is_absolute() else clean(str(run.path)),
    }


def _pooled(pool: seeds.Pool) -> dict[str, Any]:
    """What the template shows of runs with different seeds, taken together."""
    count = len(pool.runs)
    goals = []
    for name, found in pool.goals.items():
        change = found.measure.change if isinstance(found, Goal) else None
        shown = found if isinstance(found, seeds.Span) else change
        if shown is not None:
            verdict, tone = found.verdict() if isinstance(found, Goal) else (f"range of {found.seeds} seeds", "plain")
            goals.append({"name": name, "mean": facts.signed(shown.mean), "interval": f"{facts.signed(shown.low)} to {facts.signed(shown.high)}", "verdict": verdict, "tone": tone})
    after = pool.after
    return {
        "runs": [(figures.key(i), figures.colour(i)) for i in pool.runs],
        "count": count,
        "goals": goals,
        "accuracy": None if after is None else (facts.plain_number(pool.before, ".2f"), facts.plain_number(after.mean, ".2f")),
        "accuracies": None if after is None else f"{after.low:.2f} to {after.high:.2f}",
    }


def _accuracy_change(run: Told) -> str:
    """The interval of its change, empty if there is none."""
    found = run.evaluation.measures.get("accuracy") if run.evaluation else None
    return f"{facts.signed(found.change.low)} to {facts.signed(found.change.high)}" if found and found.change else ""


def _win(run: Told) -> dict[str, Any] | None:
    if run.evaluation is None or run.evaluation.win_rate is None:
        return None
    rate = run.evaluation.win_rate.rate
    return {
        "judge": run.evaluation.win_rate.judge,
        "mean": f"{rate.mean:.2f}",
        "interval": f"{rate.low:.2f} to {rate.high:.2f}",
        "shown": rate.direction(0.5) != "not shown",
    }


def _measures(runs: Sequence[Told]) -> list[tuple[str, list[tuple[str, ...] | None]]]:
    """(label, (before, after, change) in each run) of all that was measured beside the goals."""
    found = [{label: rest for label, *rest in facts.measures(run)} for run in runs]
    labels = dict.fromkeys(label for measured in found for label in measured)
    return [(label, [tuple(measured[label]) if label in measured else None for measured in found]) for label in labels]


def _eval_rows(run: Told) -> int | None:
    if run.evaluation and run.evaluation.rows is not None:
        return run.evaluation.rows
    rows = mapping(mapping(run.manifest.get("data")).get("eval")).get("rows")
    return rows if type(rows) is int else None


def _answers(runs: Sequence[Told]) -> dict[str, Any]:
    """The first answer to each prompt, before and after each run; those in sight are spread evenly, so that nothing is picked by eye."""
    told = [(figures.key(i), figures.colour(i), run.evaluation.answers) for i, run in enumerate(runs) if run.evaluation and run.evaluation.answers]
    prompts = list(dict.fromkeys(a.prompt for _, _, answers in told for a in answers))
    items = []
    for prompt in prompts[:MOST_ANSWERS]:
        given = [(key, colour, next((a for a in answers if a.prompt == prompt), None)) for key, colour, answers in told]
        before = next((a.before[0] for _, _, a in given if a and a.before), None)
        items.append({"prompt": prompt, "before": before, "after": [(key, colour, a.after[0]) for key, colour, a in given if a and a.after]})
    first = [round(i * (len(items) - 1) / max(1, min(SHOWN, len(items)) - 1)) for i in range(min(SHOWN, len(items)))]
    return {
        "count": len(prompts),
        "first": [items[i] for i in first],
        "rest": [item for i, item in enumerate(items) if i not in first],
        "left_out": len(prompts) - len(items),
    }


def _data(runs: Sequence[Told], views: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs on the same data together."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for run, view in zip(runs, views, strict=True):
        groups.setdefault((tuple(facts.data_rows(run)), tuple(facts.rewards(run))), []).append(view)
    return [{"rows": rows, "rewards": rewards, "runs": members} for (rows, rewards), members in groups.items()]


def _costs(runs: Sequence[Told]) -> list[tuple[str, list[str]]]:
    """(what, how much in each run)."""
    found = [dict(facts.costs(run)) for run in runs]
    return [(label, [costs.get(label, "\u2013") for costs in found]) for label in dict.fromkeys(label for costs in found for label in costs)]


def _differing(runs: Sequence[Told]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run) of every configuration key in which the runs differ."""
    flat = [flatten(run.config.model_dump(mode="json")) if run.config else {} for run in runs]
    keys = [key for key in dict.fromkeys(k for f in flat for k in f) if len({repr(f.get(key)) for f in flat}) > 1]
    shorten = [facts.portable(run) for run in runs]
    return [(key, [short(clean("null" if f[key] is None else str(f[key]))) if key in f else "\u2013" for f, short in zip(flat, shorten, strict=True)]) for key in keys]


def _is_report(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return MARK in file.read(4096)
    except OSError:
        return False
