"""One run for each point of a sweep, and what the points are worth beside one another."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from upo.config import RunConfig, load_config
from upo.errors import RunError, UpoError
from upo.evaluation.goals import goals_of
from upo.sweep.front import pareto_front
from upo.sweep.points import Point, Sweep
from upo.training.files import check_writable, write_text, writing
from upo.training.identity import flatten, is_free
from upo.training.keep import HIGHER
from upo.training.loop import train
from upo.training.reporter import Reporter, Silent
from upo.training.run import Run

Train = Callable[..., dict[str, Any]]
FILE = "sweep.json"


def run_sweep(sweep: Sweep, out: Path, *, reporter: Reporter, allow_code: bool = False, run: Train = train) -> dict[str, Any]:
    """Train every point that has no result yet into `out/NAME`; returns what `out/sweep.json` holds, which is written after each point.

    A point that fails is noted with the reason, and the others go on; a later call tries it again, and goes on with one that was stopped.
    All run in this process, one after the other, so that references and rewards are scored once (their caches are by content). Raises
    RunError before the first one if a result in `out` is another configuration's, KeyboardInterrupt after Ctrl-C.
    """
    check_writable(out, "--out")
    done = {point.name: finished(point, out) for point in sweep.points}
    record = {point.name: _entry(point, done[point.name]) for point in sweep.points}
    for number, point in enumerate(sweep.points, 1):
        title = f"Point {number} of {len(sweep.points)}, {point.name}"
        if done[point.name] is not None:
            reporter.info(f"{title}: done already.")
            continue
        reporter.info(f"{title}:")
        record[point.name] = _run_point(point, out / point.name, allow_code, reporter, run)
        _write(out, _result(sweep, record, allow_code))
        gc.collect()  # the model before the next one is loaded
    result = _result(sweep, record, allow_code)
    _write(out, result)
    return result


def finished(point: Point, out: Path) -> dict[str, Any] | None:
    """summary.json of a point's run, None if it has not ended. Raises RunError if it is another configuration's."""
    folder = out / point.name
    with suppress(OSError, ValueError, RecursionError):
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        before, now = (flatten(config.model_dump(mode="json")) for config in (load_config(folder / "config.yaml"), point.config))
        if changed := [key for key in sorted({*before, *now}) if before.get(key) != now.get(key) and not is_free(key)]:
            shown = "; ".join(f"{key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in changed[:3])
            raise RunError(f"--out {out}: {point.name} was trained with another configuration ({shown}). Name another folder, or move that one away.")
        return summary
    return None


def _run_point(point: Point, folder: Path, allow_code: bool, reporter: Reporter, run: Train) -> dict[str, Any]:
    started = all((folder / name).is_file() for name in ("config.yaml", "manifest.json"))
    try:
        return _entry(point, run(point.config, folder, resume=started, allow_code=allow_code, reporter=reporter))
    except UpoError as error:
        why = str(error)
    except Exception as error:  # out of memory, a bug: the other points are worth having all the same
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
    reporter.warn(f"{point.name} failed: {why} The others go on.")
    return {**_entry(point, None), "status": "failed", "error": why}


def _entry(point: Point, summary: Mapping[str, Any] | None) -> dict[str, Any]:
    after = ((summary or {}).get("eval") or {}).get("after") or {}
    metrics = {name: value for name, value in after.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
    return {"name": point.name, "set": point.set, "status": "pending" if summary is None else "done", "error": None, "metrics": metrics, "front": False}


def _result(sweep: Sweep, record: Mapping[str, dict[str, Any]], allow_code: bool) -> dict[str, Any]:
    """The entries with the front marked among those that are done."""
    entries = [record[point.name] for point in sweep.points]
    names = list(sweep.front) or _objectives(entries)
    lower = {label for point in sweep.points for label in _avoided(point.config, allow_code)}
    rows = [[_worth(entry["metrics"].get(name), name, lower) for name in names] for entry in entries]
    for entry, on_front in zip(entries, pareto_front(rows), strict=True):
        entry["front"] = bool(names) and on_front
    return {"goals": names, "points": entries}


def _objectives(entries: list[dict[str, Any]]) -> list[str]:
    """Accuracy and the goals on sampled answers, those that some point has."""
    there = dict.fromkeys(name for entry in entries for name in entry["metrics"])
    return [name for name in there if name == "accuracy" or name.startswith("goal/")]


def _worth(value: float | None, name: str, lower: set[str]) -> float:
    """The larger the better; NaN where there is none."""
    if value is None:
        return float("nan")
    better = name.removeprefix("goal/") not in lower if name.startswith("goal/") else name in HIGHER
    return float(value) if better else -float(value)


def _avoided(config: RunConfig, allow_code: bool) -> list[str]:
    """Names of the goals with a negative weight; of a point whose goals cannot be used, none: it has failed."""
    try:
        return [goal.label for goal in goals_of(config, allow_code, Silent()) if goal.weight < 0]
    except UpoError:
        return []


def _write(out: Path, result: Mapping[str, Any]) -> None:
    with writing(out / FILE, "Make room, then use the same command: what is done is not run again."):
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / FILE, json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def unfinished(point: Point, out: Path) -> bool:
    """Whether the point's run was begun and has not ended."""
    return (out / point.name / "config.yaml").is_file() and not Run(out / point.name).has_summary
