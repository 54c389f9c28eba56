"""Time and memory of a row against its length and against completions per prompt, as a table and a plot."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from harness import lineup
from harness.peers import header, pythons
from harness.plot import Curve, Panel, picture
from harness.runs import Contender, Failed, Run, measure, same_tokens
from harness.tables import table
from harness.work import Work, made_groups, made_pairs, prepare

STEPS = 2  # of one row each; the first warms up
GROUP_PROMPT, GROUP_COMPLETION = 384, 128
REWARDED = "objective={auxiliary: {rewards: [{scorer: column, column: score}], value: {fit_steps: 0}}}"
Found = dict[str, dict[int, Run]]  # contender -> length or count -> run


def lengths(folder: Path, options: argparse.Namespace) -> str:
    """Markdown, and lengths.svg beside it: pairs of growing length, then prompts with more completions."""
    by_length = {n: prepare(folder / f"pairs-{n}", pairs_of(n), options.model, batch_size=1, max_length=n) for n in options.lengths}
    by_count = {
        n: prepare(folder / f"groups-{n}", made_groups(STEPS, GROUP_PROMPT, GROUP_COMPLETION, n), options.model, batch_size=1, max_length=GROUP_PROMPT + GROUP_COMPLETION)
        for n in options.completions
    }
    paired = [c for backend in options.backends for c in pair_contenders(backend) if wanted(c, options)]
    grouped = [c for backend in options.backends for c in group_contenders(backend) if wanted(c, options)]
    with_peers = pythons(options.venvs, {c.program for c in (*paired, *grouped)})
    missing: list[str] = []
    pairs, groups = (sweep(chosen, works, folder, with_peers, missing) for chosen, works in ((paired, by_length), (grouped, by_count)))
    titles = ("tokens of prompt and completion", f"completions of {GROUP_COMPLETION} tokens per prompt of {GROUP_PROMPT}")
    panels = [Panel(f"{what} a row", title, curves(found, of)) for title, found in zip(titles, (pairs, groups), strict=True) for what, of in MEASURES]
    (options.out / "lengths.svg").write_text(picture(panels, columns=len(MEASURES)), encoding="utf-8")
    runs = [run for found in (pairs, groups) for by in found.values() for run in by.values()]
    text = f"## Length and completions per prompt\n\n{header(runs)}\nReference pass included; the faster of {STEPS} steps of one row. Half of a pair's length is prompt.\n\n"
    for title, found in zip(titles, (pairs, groups), strict=True):
        text += listing(title, found) + "\n"
    return text + "![time and memory](lengths.svg)\n" + "".join(f"\n- {line}" for line in missing) + "\n" * bool(missing)


def row_seconds(run: Run) -> float:
    """Seconds for one row: the reference pass shared out, and the faster step."""
    steps = len(run.steps_s)
    return (run.reference_s - run.reference_in_steps_s) / steps + min(run.steps_s)


MEASURES: tuple[tuple[str, Callable[[Run], float]], ...] = (("seconds", row_seconds), ("GB", lambda run: run.peak_memory_gb))


def pairs_of(length: int) -> list[dict[str, Any]]:
    prompt = length // 2
    return made_pairs([(prompt, length - prompt, length - prompt)] * STEPS, seed=length)


def pair_contenders(backend: str) -> list[Contender]:
    peer = {"torch": lineup.TRL_FAST[0], "mlx": lineup.MLX_LM_LORA_EAGER}[backend]
    return [*(Contender(c.name, c.program, c.settings) for c in ours(backend)), peer]


def group_contenders(backend: str) -> list[Contender]:
    """Ours alone: the others know no prompts with several scored completions. Without sharing it is what they would do."""
    return [Contender(c.name, c.program, {**c.settings, "set": [*c.settings["set"], REWARDED]}) for c in ours(backend)]


def ours(backend: str) -> list[Contender]:
    dtype = "bfloat16" if backend == "torch" else "float32"
    return [lineup.upo(backend, dtype), lineup.upo(backend, dtype, 'train.prefix_sharing="off"', name="no shared prompts")]


def sweep(contenders: Iterable[Contender], works: dict[int, Work], folder: Path, with_peers: Any, missing: list[str]) -> Found:
    """A run of each contender at each size, smallest first. One that fails (memory, mostly) is named and not tried at larger sizes."""
    chosen = list(contenders)
    found: Found = {c.name: {} for c in chosen}
    failed: set[str] = set()
    for size, work in works.items():
        for contender in chosen:
            if contender.name in failed:
                continue
            try:
                found[contender.name][size] = measure(contender, work, folder / Path(work.rows).parent.name / contender.folder, with_peers)
            except Failed as error:
                failed.add(contender.name)
                missing.append(f"{contender.name} stops at {size}: {error}")
        same_tokens([by[size] for by in found.values() if size in by])
    return found


def curves(found: Found, of: Callable[[Run], float]) -> list[Curve]:
    return [Curve(name, [(size, of(run)) for size, run in by.items()]) for name, by in found.items() if by]


def listing(title: str, found: Found) -> str:
    sizes = list(dict.fromkeys(size for by in found.values() for size in by))
    lines = []
    for name, by in found.items():
        cells = [f"{row_seconds(by[n]):.2f} s, {by[n].peak_memory_gb:.2f} GB" if n in by else "–" for n in sizes]
        lines.append((name, *cells))
    return table((title, *sizes), lines)


def wanted(contender: Contender, options: argparse.Namespace) -> bool:
    return not options.contender or any(part in contender.name for part in options.contender)
