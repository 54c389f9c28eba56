"""Time and memory of a step against the length of a row, completions per prompt and rows, beside the arithmetic: tables and a plot."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import lineup
from harness.arithmetic import step_flops
from harness.peers import header, pythons
from harness.plot import Curve, Panel, picture
from harness.runs import Contender, Ended, Run, measure, same_tokens
from harness.tables import table
from harness.work import Work, made_groups, made_pairs, prepare

STEPS = 2  # the first warms up
GROUP_PROMPT, GROUP_COMPLETION = 384, 128
ROW_LENGTH = 256  # of the rows that are counted
REWARDED = "objective={auxiliary: {rewards: [{scorer: column, column: score}], value: {fit_steps: 0}}}"
ARITHMETIC = "arithmetic, at the speed of ours at the first point"


@dataclass
class Sweep:
    """Contenders at growing sizes."""

    title: str
    works: dict[int, Work]
    contenders: Sequence[Contender]
    found: dict[str, dict[int, Run]] = field(default_factory=dict)  # contender -> size -> run


def lengths(folder: Path, options: argparse.Namespace) -> str:
    """Markdown, and lengths.svg beside it."""
    made = lambda name, rows, batch, most: prepare(folder / name, rows, options.model, batch_size=batch, max_length=most)  # noqa: E731
    by_length = {n: made(f"pairs-{n}", pairs_of(n), 1, n) for n in options.lengths}
    by_count = {n: made(f"groups-{n}", made_groups(STEPS, GROUP_PROMPT, GROUP_COMPLETION, n), 1, GROUP_PROMPT + GROUP_COMPLETION) for n in options.completions}
    by_rows = {n: made(f"rows-{n}", pairs_of(ROW_LENGTH, n * STEPS), n, ROW_LENGTH) for n in options.rows_a_step}
    sweeps = [
        Sweep("tokens of prompt and completion", by_length, chosen(pair_contenders, options)),
        Sweep(f"completions of {GROUP_COMPLETION} tokens per prompt of {GROUP_PROMPT}", by_count, chosen(group_contenders, options)),
        Sweep(f"pairs of {ROW_LENGTH} tokens a step", by_rows, chosen(row_contenders, options)),
    ]
    with_peers = pythons(options.venvs, {c.program for sweep in sweeps for c in sweep.contenders})
    missing = [line for sweep in sweeps for line in measured(sweep, folder, with_peers)]
    panels = [Panel(f"{what} a step", sweep.title, curves(sweep, of)) for sweep in sweeps for what, of in MEASURES]
    (options.out / "lengths.svg").write_text(picture(panels, columns=len(MEASURES)), encoding="utf-8")
    runs = [run for sweep in sweeps for by in sweep.found.values() for run in by.values()]
    text = f"## Length, completions per prompt and rows\n\n{header(runs)}\nThe faster of {STEPS} steps, of one row but where rows are counted, with its share of the reference pass. "
    text += "Pairs are trained by DPO; half of a pair's length is prompt. Rows with several completions are trained on their scores. The arithmetic has every prompt once.\n\n"
    return text + "\n".join(map(listing, sweeps)) + "\n![time and memory](lengths.svg)\n" + "".join(f"\n- {line}" for line in missing) + "\n" * bool(missing)


def step_seconds(run: Run) -> float:
    """Seconds for one step: its share of the reference pass, and the faster step."""
    steps = len(run.steps_s)
    return (run.reference_s - run.reference_in_steps_s) / steps + min(run.steps_s)


MEASURES: tuple[tuple[str, Callable[[Run], float]], ...] = (("seconds", step_seconds), ("GB", lambda run: run.peak_memory_gb))


def pairs_of(length: int, count: int = STEPS) -> list[dict[str, Any]]:
    prompt = length // 2
    return made_pairs([(prompt, length - prompt, length - prompt)] * count, seed=length)


def pair_contenders(backend: str) -> list[Contender]:
    peer = {"torch": lineup.TRL_FAST[0], "mlx": lineup.MLX_LM_LORA_EAGER}[backend]
    return [*ours(backend), peer]


def group_contenders(backend: str) -> list[Contender]:
    """Ours alone: the others know no prompts with several scored completions. Without sharing it is what they would do."""
    return [Contender(c.name, c.program, {**c.settings, "set": [*c.settings["set"], REWARDED]}) for c in ours(backend)]


def row_contenders(backend: str) -> list[Contender]:
    return ours(backend)[:1]


def ours(backend: str) -> list[Contender]:
    dtype = "bfloat16" if backend == "torch" else "float32"
    return [lineup.upo(backend, dtype), lineup.upo(backend, dtype, 'train.prefix_sharing="off"', name="no shared prompts")]


def chosen(of: Callable[[str], list[Contender]], options: argparse.Namespace) -> list[Contender]:
    return [c for backend in options.backends for c in of(backend) if lineup.wanted(c, options)]


def measured(sweep: Sweep, folder: Path, with_peers: Any) -> Iterable[str]:
    """A run of each contender at each size, smallest first. Yields a line for one that fails (memory, mostly), which is not tried at larger sizes."""
    failed: set[str] = set()
    sweep.found = {c.name: {} for c in sweep.contenders}
    for size, work in sweep.works.items():
        for contender in sweep.contenders:
            if contender.name in failed:
                continue
            try:
                sweep.found[contender.name][size] = measure(contender, work, folder / Path(work.rows).parent.name / contender.folder, with_peers)
            except Ended as error:
                failed.add(contender.name)
                yield f"{contender.name} stops at {size}: {error}"
        same_tokens([by[size] for by in sweep.found.values() if size in by])


def curves(sweep: Sweep, of: Callable[[Run], float]) -> list[Curve]:
    """One for each contender; beside the seconds, how they would grow if all arithmetic went on at the speed of the first contender's first point."""
    found = [Curve(name, [(size, of(run)) for size, run in by.items()]) for name, by in sweep.found.items() if by]
    if found and of is step_seconds:
        (first, seconds), flops = found[0].points[0], {size: step_flops(work)[0] for size, work in sweep.works.items()}
        found.append(Curve(ARITHMETIC, [(size, seconds * n / flops[int(first)]) for size, n in flops.items()]))
    return found


def listing(sweep: Sweep) -> str:
    lines = []
    for name, by in sweep.found.items():
        lines.append((name, *(f"{step_seconds(by[n]):.2f} s, {by[n].peak_memory_gb:.2f} GB" if n in by else "–" for n in sweep.works)))
    flops = [step_flops(work) for work in sweep.works.values()]
    lines.append(("arithmetic, TFLOP", *(f"{total / 1e12:.2f}" for total, _ in flops)))
    lines.append(("attention's share of it", *(f"{100 * share:.0f} %" for _, share in flops)))
    return table((sweep.title, *map(str, sweep.works)), lines)
