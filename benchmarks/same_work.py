"""Do all contenders compute the same? Equal token ids in equal order, and losses and first gradient norm alike, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from harness.lineup import EQUAL
from harness.peers import header
from harness.runs import Contender, Pythons, Run, measure, same_tokens
from harness.tables import table
from harness.work import Work, prepare

TOLERANCE = 0.02  # of the losses and of the first gradient norm; other kernels and summation orders move them by far less
STEPS = 12
NAMED = """What cannot be equal, or was made so:

- TRL and mlx-lm-lora get the rows in the order in which upo takes them, and the adapter with which upo starts.
- TRL gets them as plain strings: of a conversation it would also score the line break that the chat template writes after the end of turn.
- mlx-lm-lora gets the rows as token ids and one step's rows at a time: left alone it draws each batch anew from all data, so that "an epoch"
  leaves rows out and takes others twice. Its Adam gets the bias correction that it leaves out by default, its device report the one
  number that it asks for and only Metal has (`max_recommended_working_set_size`); without that it does not start elsewhere.
- The largest gradient norm is out of reach here, as mlx-lm-lora has none.
"""


def same_work(folder: Path, rows: Sequence[dict], model: Path, pythons: Pythons, contenders: Sequence[Contender] = EQUAL, max_length: int = 1024) -> tuple[str, list[str]]:
    """Markdown, and what is unequal. 12 steps over the rows, learning rate 1e-4. Raises Failed."""
    size = max(1, len(rows) // STEPS)
    work = replace(prepare(folder / "work", rows, model, batch_size=size, max_length=max_length), lr=1e-4, clip=1e9)
    runs = [measure(c, work, folder / c.folder, pythons) for c in contenders]
    same_tokens(runs)
    return report(runs, work)


def report(runs: Sequence[Run], work: Work) -> tuple[str, list[str]]:
    """The comparison with the first run as Markdown, and each run whose losses or first gradient norm are off by more than TOLERANCE."""
    first = runs[0]
    lines, unequal = [], []
    for run in runs:
        loss, norm = furthest(run.losses, first.losses), relative(run.grad_norms[0], first.grad_norms[0])
        losses = f"{run.losses[0]:.4f} ... {run.losses[-1]:.4f}"
        lines.append((run.contender, losses, f"{loss:.2%}", f"{run.grad_norms[0]:.4f}", f"{norm:.2%}"))
        if loss > TOLERANCE or norm > TOLERANCE:
            unequal.append(f"{run.contender} against {first.contender}: losses differ by up to {loss:.2%}, the first gradient norm by {norm:.2%} (limit {TOLERANCE:.0%}).")
    tokens = first.tokens
    work_done = (
        f"{tokens['rows']} pairs, {work.steps} steps of {work.batch_size}, {tokens['prompt']:,} prompt and {tokens['completion']:,} completion tokens, "
        f"the same ids in the same order in all (SHA-256 {tokens['sha256'][:12]}). DPO, beta {work.beta}, learning rate {work.lr:g}, float32."
    )
    columns = ("contender", "loss, first ... last step", "largest difference", "first gradient norm", "difference")
    verdict = "Unequal: " + " ".join(unequal) if unequal else f"All within {TOLERANCE:.0%}."
    return f"## Same work\n\n{header(runs)}\n{work_done}\n\n{table(columns, lines)}\n{verdict}\n\n{NAMED}", unequal


def relative(value: float, expected: float) -> float:
    return abs(value - expected) / max(abs(expected), 1e-12)


def furthest(values: Sequence[float], expected: Sequence[float]) -> float:
    """The largest relative difference; infinite where there are fewer or more values."""
    if len(values) != len(expected):
        return float("inf")
    return max(relative(a, b) for a, b in zip(values, expected, strict=True))
