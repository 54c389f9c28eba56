"""Value and gradients of an objective on a case, by an interpreter. For tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from interpreters import Interpreter
from loss_cases import Case, scores
from oracle.inputs import LEAVES

from upo.losses import LOSSES, Objective, loss_options


def evaluate(i: Interpreter, objective: Objective, case: Case, count: dict[str, int] | None = None) -> dict[str, float]:
    """`loss` and its terms."""
    return {name: float(i.numpy(x)) for name, x in objective(i.ops, scores(i, case, count, objective)).items()}


def gradients(
    i: Interpreter, objective: Objective, case: Case, count: dict[str, int] | None = None, term: str = "loss"
) -> list[np.ndarray]:
    """Of a term by every leaf, in the order of LEAVES."""
    given = scores(i, case, count, objective)
    run = lambda *leaves: objective(i.ops, replace(given, **dict(zip(LEAVES, leaves, strict=True))))[term]  # noqa: E731
    return i.gradient(run, [case[leaf] for leaf in LEAVES])


def implicit_reward(term: Mapping[str, Any], case: Case) -> np.ndarray:
    """What a loss takes the completions to be worth: the quantity whose difference within a pair, or whose size, it changes."""
    logp, ref, length = (np.array(case[name], np.float64) for name in ("logp", "ref_logp", "length"))
    options = {**loss_options(LOSSES[term["loss"]]), **term}
    scale = options.get("beta", 1.0)
    if term["loss"] in ("simpo", "cpo_simpo", "orpo", "asft", "sft", "csft", "alpha_dpo") or options.get("form") == "reference_free":
        return scale * logp / length
    if term["loss"] in ("cpo", "slic"):
        return scale * logp
    if term["loss"] == "dpo_norm":
        return scale * (logp - ref) / length
    return options.get("tau", scale) * (logp - ref) if term["loss"] == "dro_v" else scale * (logp - ref)
