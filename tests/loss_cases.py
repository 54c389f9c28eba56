"""Steps and objectives on which every loss is compared with the oracle, as plain lists (the oracle) and as `Scores` (ours)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from interpreters import Interpreter

from upo.losses import Auxiliary, Objective, Scores, build_loss

Case = dict[str, Any]

AUXILIARY = {"gamma": 0.5, "temperature": 5.0, "value_coef": 0.1, "expectile": 0.7}
OBJECTIVES: dict[str, tuple[list[dict[str, Any]], dict[str, Any] | None]] = {
    "dpo": ([{"loss": "dpo", "beta": 0.1}], None),
    "dpo-smooth": ([{"loss": "dpo", "beta": 0.3, "label_smoothing": 0.1}], None),
    "kto": ([{"loss": "kto", "beta": 0.1}], None),
    "kto-weights": ([{"loss": "kto", "beta": 0.2, "desirable_weight": 1.33, "undesirable_weight": 0.5}], None),
    "sft": ([{"loss": "sft"}], None),
    "dpo+sft": ([{"loss": "dpo", "beta": 0.1, "weight": 0.7}, {"loss": "sft", "weight": 0.3}], None),
    "upo": ([{"loss": "kto", "beta": 0.1}], AUXILIARY),
    "upo-dpo": ([{"loss": "dpo", "beta": 0.1}], {**AUXILIARY, "gamma": 3.0, "expectile": 0.5}),
    "upo-warmup": ([{"loss": "kto", "beta": 0.1}], {**AUXILIARY, "actor_warmup_steps": 4}),
    "auxiliary": ([], {**AUXILIARY, "temperature": 0.0}),
}


def exact(x: Any) -> list[float]:
    """Numbers that float32 holds exactly, so that every interpreter and the oracle see the same."""
    return np.asarray(x, np.float32).astype(np.float64).tolist()


def make_case(logp: Any, ref_logp: Any, partners: Any, reward: Any, value: Any, length: Any, rng: np.random.Generator) -> Case:
    """Half of the completions chosen, half rejected, in no particular order."""
    n = len(logp)
    order = rng.permutation(n).tolist()
    chosen, rejected = order[: n // 2], order[n // 2 :]
    return {
        "logp": exact(logp),
        "ref_logp": exact(ref_logp),
        "length": exact(length),
        "label": [1.0 if i in chosen else -1.0 for i in range(n)],
        "chosen": chosen,
        "rejected": rejected,
        "partner_logratio": exact(partners),
        "reward": exact(reward),
        "value": exact(value),
        "step": 3,
    }


def make_cases() -> dict[str, Case]:
    rng = np.random.default_rng(7)
    n = 8
    lengths = rng.integers(1, 40, n)
    ref = -np.abs(rng.normal(30, 20, n))
    far = np.where(np.arange(n) % 3 == 0, -1e3, -0.25)
    flat = np.full(n, -12.5)
    uniform = rng.uniform(0, 1, (4, n))
    return {
        "random": make_case(ref + rng.normal(0, 6, n), ref, rng.normal(0.5, 1, n), *uniform[:2], lengths, rng),
        "below": make_case(ref + rng.normal(0, 2, n), ref, rng.normal(-3, 1, n), *uniform[2:], lengths, rng),  # z0 clipped at 0
        "extreme": make_case(far, far[::-1], np.array([1e3, -990, 12, -2]), 3 * uniform[0] - 1, uniform[1], lengths, rng),
        "tied": make_case(flat, flat, np.zeros(n), np.full(n, 0.5), np.full(n, 0.5), np.full(n, 7), rng),
        "zero": make_case(*np.zeros((5, n)), np.ones(n), rng),
    }


CASES = make_cases()


def build(terms: Sequence[Mapping[str, Any]], auxiliary: Mapping[str, Any] | None) -> Objective:
    """The library's objective for the oracle's description of it."""
    options = lambda term: {k: v for k, v in term.items() if k not in ("loss", "weight")}  # noqa: E731
    losses = tuple((build_loss(term["loss"], **options(term)), float(term.get("weight", 1.0))) for term in terms)
    return Objective(losses, Auxiliary(**auxiliary) if auxiliary else None)


def scores(i: Interpreter, case: Mapping[str, Any], count: Mapping[str, int] | None = None) -> Scores:
    """A case, or a part of a step with that step's counts, as the interpreter's arrays."""
    raw = Scores(
        **{name: np.array(case[name], np.float64) for name in ("logp", "length", "label", "ref_logp", "partner_logratio", "reward", "value")},
        **{name: np.array(case[name], np.int64) for name in ("chosen", "rejected")},
        count=dict(count or counts(case)),
        step=case.get("step", 0),
    )
    return raw.map(i.floats, i.indices)


def counts(case: Mapping[str, Any]) -> dict[str, int]:
    n = len(case["logp"])
    chosen = sum(label > 0 for label in case["label"])
    return {"pair": len(case["chosen"]), "completion": n, "chosen": chosen, "group": n, "token": int(sum(case["length"]))}


def part(case: Case, pairs: Sequence[int]) -> Case:
    """A micro-batch: the given pairs with their completions; partners are the whole step's."""
    kept = sorted(case["chosen"][p] for p in pairs) + sorted(case["rejected"][p] for p in pairs)
    vectors = {name: [case[name][k] for k in kept] for name in ("logp", "ref_logp", "length", "label", "reward", "value")}
    index = {name: [kept.index(case[name][p]) for p in pairs] for name in ("chosen", "rejected")}
    return {**case, **vectors, **index}
