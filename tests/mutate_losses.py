"""Breaks every loss on purpose, one small change at a time, and reports which changes the loss tests would not notice.

    python tests/mutate_losses.py [LOSS or FUNCTION ...]      about two minutes; without arguments everything

Changes: signs and operators exchanged, an operand left out, comparisons turned, branches and branches of `where` exchanged, constants
doubled, chosen and rejected exchanged, stop_gradient and relu taken away, one option used for another. They are made in the syntax trees
of upo/losses/*.py and executed in memory; no file is written. A mutant is caught when it raises, or when a value, a gradient or a running
statistic leaves the tolerance that tests/backends/test_losses_*.py hold NumPy and torch (float64) to on the same cases, or when it fails
their checks of NaN, of huge log-ratios or of a step without a unit. Survivors must be in EQUIVALENT with the reason; the exit status is 1
otherwise. Not collected by pytest.
"""

from __future__ import annotations

import ast
import copy
import inspect
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_threads] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "backends")]

import loss_objectives  # noqa: E402
import numpy as np  # noqa: E402
import test_losses_properties as properties  # noqa: E402
from interpreters import close, interpreter  # noqa: E402
from loss_cases import CASES, expected, fitted, raw_scores, state_before  # noqa: E402
from loss_objectives import OBJECTIVES, applies, build  # noqa: E402
from loss_runs import evaluate, gradients, implicit_reward  # noqa: E402
from mutants import mutants  # noqa: E402
from oracle import step as oracle  # noqa: E402
from oracle.inputs import LEAVES  # noqa: E402

from upo.losses import FAMILIES, LOSSES, auxiliary, base, objective  # noqa: E402
from upo.losses.base import Loss, Scores  # noqa: E402

NUMPY, TORCH = interpreter("numpy"), interpreter("torch64")
SKIPPED = ("__post_init__", "check_run", "requires", "columns", "needs", "map", "given", "expectile", "coupled", "source")
SAME_EITHER_WAY = "what is done with the two is symmetric"
COMMON_FACTOR = "of the divisor: a factor common to all weights cancels between chosen and rejected"
EQUIVALENT: dict[str, str] = {
    "reshaped.LDDPO.__call__: length_w, length_l = sides(ops, scores, scores.length)  ->  length_l, length_w = sides(ops, scores, scores.length)": SAME_EITHER_WAY,
    "adaptive.WPO.__call__: typical_w, typical_l = sides(ops, scores, (ops.stop_gradient(scores.logp) - scores.given('collision')) / scores.length)  ->  "
    "typical_l, typical_w = sides(ops, scores, (ops.stop_gradient(scores.logp) - scores.given('collision')) / scores.length)": SAME_EITHER_WAY,
    "valued.OfflinePPO.__call__: full, kept = (-advantage * capped_exp(ops, logratio), -advantage * _clipped(ops, logratio, low, high))  ->  "
    "kept, full = (-advantage * capped_exp(ops, logratio), -advantage * _clipped(ops, logratio, low, high))": "the larger of two; they have one slope where they are equal, except at the very bounds",
    "adaptive.AdaDPO.__call__: ops.stop_gradient(self._scale(ops, ops.stop_gradient(u)))  ->  self._scale(ops, ops.stop_gradient(u))": "u is a constant already",
    "adaptive.AdaDPO.__call__: ops.stop_gradient(u)  ->  u": "the result is made a constant",
    "adaptive.AdaDPO._scale: 0.0 * u + 1.0  ->  1.0": "a number broadcasts like an array of it",
    "adaptive.AdaDPO._scale: 0.0 * u  ->  0.0": "a number broadcasts like an array of it",
    "adaptive.AdaDPO._scale: 0.0 * u  ->  0.0 / u": "0 / 0 at u = 0, where any start ends at tau_min",
    "adaptive.AdaDPO._scale: 1e-06  ->  2e-06": "the floor: a step divided by it ends at a bound, or hardly depends on it beside 2 rho",
    "adaptive.AdaDPO._scale: 1e-06  ->  2e-06  (number 2)": "of the comparison: matters only to a curvature between the two",
    "batchwise.RelativePO.__call__: 0.0 * ops.take(scores.logp, scores.positive)  ->  0.0 / ops.take(scores.logp, scores.positive)": "0 either way",
    "batchwise.RelativePO.__call__: scores.positive  ->  scores.negative  (number 2)": "of a step without one of them: sums to 0 either way",
    "batchwise._sorted: ops.stop_gradient(x)  ->  x": "indices carry no gradient",
    "references.MRPO.__call__: 1  ->  2": "a batch size, which mrpo does not look at",
    "references.MRPO._weights: sum(certain) + 1e-06  ->  sum(certain) - 1e-06": COMMON_FACTOR,
    "references.MRPO._weights: sum(certain) + 1e-06  ->  1e-06": COMMON_FACTOR,
    "references.MRPO._weights: 1e-06  ->  2e-06": COMMON_FACTOR,
    "references.MRPO._clipped: 0.5  ->  1.0": "where every reference is sure of both completions there is nothing to clip",
    "references.MRPO._clipped: 1.0  ->  2.0": "a divisor where its result is not taken",
    "references.MRPO._blend: 1.0  ->  2.0": "an argument of log where its result is not taken",
    "unpaired.KTO.__call__: ops.stop_gradient(ops.sum(partners) / partners.shape[0])  ->  ops.sum(partners) / partners.shape[0]": "partners are constants",
    "valued.OfflinePPO.__call__: ops.stop_gradient(more)  ->  more": "made of lengths, which are constants",
}


# --- What is checked --------------------------------------------------------------------------------------------------------------


def check(names: list[str]) -> None:
    """Raises where one of these objectives is not what the oracle says it is."""
    for case in CASES:
        for name in names:
            if not applies(name, case):
                continue
            given, wanted, goal = fitted(name, CASES[case]), expected(name, case), build(*OBJECTIVES[name])
            for term, value in evaluate(NUMPY, goal, given).items():
                close(NUMPY, "value", value, wanted[term.removeprefix("loss/")], size=wanted["size"])
            for leaf, slopes in zip(LEAVES, gradients(TORCH, goal, given), strict=True):
                close(TORCH, "gradient", slopes, wanted["gradient"].get(leaf, np.zeros(len(given[leaf]))))
            statistics(name, case)
    for name in names:
        goal, given = build(*OBJECTIVES[name]), fitted(name, CASES["random"])
        for term, described in zip(goal.preference, OBJECTIVES[name][0], strict=True):
            close(NUMPY, "value", term.loss.implicit_reward(raw_scores(given)), implicit_reward(described, given))
        properties.nan_stays_nan(NUMPY, goal, given)
        properties.huge_is_finite(interpreter("torch"), goal, given)
    properties.test_a_step_without_a_unit_adds_nothing("torch")


def statistics(name: str, case: str) -> None:
    terms, goal = OBJECTIVES[name][0], build(*OBJECTIVES[name])
    if not goal.initial_state():
        return
    raw = raw_scores(CASES[case])
    found = goal.advance(replace(raw, state=state_before(goal, CASES[case])))
    for place, term in enumerate(terms):
        if term["loss"] in ("bco", "alpha_dpo"):
            for key, value in oracle.state(CASES[case], term).items():
                close(NUMPY, "value", found[f"{place}.{term['loss']}.{key}"], value)


def objectives_of(losses: set[str]) -> list[str]:
    """Those made of these losses, single ones first."""
    chosen = [name for name, (terms, _) in OBJECTIVES.items() if {term["loss"] for term in terms} & losses]
    return sorted(chosen, key=lambda name: (len(OBJECTIVES[name][0]), OBJECTIVES[name][1] is not None))


# --- Putting a mutant in place ----------------------------------------------------------------------------------------------------


@contextmanager
def replaced(targets: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Attributes, or items of a dict, set for a while."""
    before = [(owner, name, owner[name] if isinstance(owner, dict) else getattr(owner, name)) for owner, name, _ in targets]

    def put(entries: list[tuple[Any, str, Any]]) -> None:
        for owner, name, value in entries:
            if isinstance(owner, dict):
                owner[name] = value
            else:
                setattr(owner, name, value)

    put(targets)
    try:
        yield
    finally:
        put(before)


def executed(tree: ast.Module, module: ModuleType) -> dict[str, Any]:
    space: dict[str, Any] = {"__name__": module.__name__, "__package__": module.__package__, "__file__": module.__file__}
    exec(compile(tree, str(module.__file__), "exec"), space)
    return space


def in_family(module: ModuleType, space: dict[str, Any], owner: str) -> tuple[list[tuple[Any, str, Any]], list[str]]:
    """A mutant of a loss, or of what the losses of its file share."""
    classes = [c for c in space.values() if isinstance(c, type) and issubclass(c, Loss) and c.__module__ == module.__name__ and hasattr(c, "name")]
    hit = {c.name for c in classes if c.__name__ == owner} or {c.name for c in classes}
    return [(LOSSES, c.name, c) for c in classes if c.name in hit], objectives_of(hit)


def in_base(module: ModuleType, space: dict[str, Any], owner: str) -> tuple[list[tuple[Any, str, Any]], list[str]]:
    """A mutant of a function that all files share, or of a method of the scores."""
    if owner == "Scores":
        mutant = space["Scores"]
        methods = [(Scores, name, f) for name, f in vars(mutant).items() if isinstance(f, FunctionType) and not name.startswith("_")]
        return methods, objectives_of(set(LOSSES))
    if owner == "Loss":
        return [(Loss, name, vars(space["Loss"])[name]) for name in ("advance", "implicit_reward")], objectives_of(set(LOSSES))
    users = [family for family in FAMILIES if owner in vars(family)]
    losses = {name for name, loss in LOSSES.items() if any(loss.__module__ == family.__name__ for family in users)}
    return [(family, owner, space[owner]) for family in users], objectives_of(losses)


def in_auxiliary(module: ModuleType, space: dict[str, Any], owner: str) -> tuple[list[tuple[Any, str, Any]], list[str]]:
    return [(loss_objectives, "Auxiliary", space["Auxiliary"])], [name for name, (_, aux) in OBJECTIVES.items() if aux]


def in_objective(module: ModuleType, space: dict[str, Any], owner: str) -> tuple[list[tuple[Any, str, Any]], list[str]]:
    names = [name for name in OBJECTIVES if name.startswith(("weighted", "two", "mpo", "upo", "auxiliary"))]
    return [(loss_objectives, name, space[name]) for name in ("Objective", "Term")], names


Placing = Callable[[ModuleType, dict[str, Any], str], tuple[list[tuple[Any, str, Any]], list[str]]]
PLACES: list[tuple[ModuleType, Placing]] = [*((family, in_family) for family in FAMILIES), (base, in_base), (auxiliary, in_auxiliary), (objective, in_objective)]


def survives(tree: ast.Module, module: ModuleType, place: Placing, owner: str) -> bool:
    try:
        targets, names = place(module, executed(tree, module), owner)
        with replaced(targets):
            check(names)
    except Exception:
        return False
    return True


def main(wanted: list[str]) -> int:
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    start, total, caught, met, survivors = time.time(), Counter[str](), Counter[str](), Counter[str](), dict[str, str]()
    check(list(OBJECTIVES))
    for module, place in PLACES:
        tree = ast.parse(inspect.getsource(module))
        family = module.__name__.rpartition(".")[2]
        for owner, function, what, mutate in mutants(tree, SKIPPED):
            if wanted and not {owner, function, getattr(getattr(module, owner, None), "name", "")} & set(wanted):
                continue
            key = f"{family}.{owner}.{function}: {what}" if function != owner else f"{family}.{function}: {what}"
            met[key] += 1
            key += f"  (number {met[key]})" if met[key] > 1 else ""
            broken = copy.deepcopy(tree)
            mutate(broken)
            total[family] += 1
            if survives(ast.fix_missing_locations(broken), module, place, owner):
                survivors[key] = family
            else:
                caught[family] += 1
    for family in total:
        print(f"{family:16s} {caught[family]:4d} of {total[family]:4d} caught")
    unknown = [key for key in survivors if key not in EQUIVALENT]
    stale = [] if wanted else [key for key in EQUIVALENT if key not in survivors]
    for key in survivors:
        print(f"{'equivalent' if key in EQUIVALENT else 'SURVIVED'}: {key}" + (f"   ({EQUIVALENT[key]})" if key in EQUIVALENT else ""))
    for key in stale:
        print(f"listed as equivalent, but caught or gone: {key}")
    print(f"{sum(caught.values())} of {sum(total.values())} mutants caught, {len(survivors) - len(unknown)} equivalent, {len(unknown)} survived; {time.time() - start:.0f} s")
    return 1 if unknown or stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
