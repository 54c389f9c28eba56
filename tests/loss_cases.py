"""Steps on which every loss is compared with the oracle, as plain lists (the oracle) and as `Scores` (ours)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from interpreters import Interpreter
from loss_objectives import OBJECTIVES
from oracle import step as oracle

from upo.losses import Objective, Scores

Case = dict[str, Any]
COMPLETION_LISTS = ("logp", "ref_logp", "length", "label", "owner", "reward", "value", "collision", "quantile", "ref_rewards")
TOKEN_LISTS = ("token_logp", "ref_token_logp", "token_value")
PAIR_LISTS = ("anchor_logp", "anchor_ref_logp")


def grid(x: Any) -> np.ndarray:
    """Multiples of 2^-10, of which float32 holds any sum up to 16,384 exactly: every interpreter and the oracle see the same."""
    return np.round(np.asarray(x, np.float64) * 1024) / 1024


def exact(x: Any) -> list[float]:
    """Numbers that float32 holds exactly."""
    return np.asarray(x, np.float32).astype(np.float64).tolist()


def spread(total: float, parts: int, rng: np.random.Generator) -> np.ndarray:
    """`parts` numbers of the grid that sum to `total`, all of its sign."""
    share = grid(total * rng.dirichlet(np.full(parts, 2.0)))
    share[-1] = total - share[:-1].sum()
    return share


def make_case(rng: np.random.Generator, logp: Any, ref_logp: Any, length: Any, **given: Any) -> Case:
    """A step of pairs: half of the completions chosen, half rejected, in no particular order; the first two pairs share a prompt."""
    n = len(logp)
    order = rng.permutation(n).tolist()
    chosen, rejected = given.get("pairs", (order[: n // 2], order[n // 2 :]))
    label = given.get("label", [1.0 if i in chosen else -1.0 for i in range(n)])
    prompt = {i: max(0, p - 1) for side in (chosen, rejected) for p, i in enumerate(side)}
    logp, ref_logp, m = grid(logp), grid(ref_logp), int(sum(length))
    tokens = [spread(lp, k, rng) for lp, k in zip(logp, length, strict=True)]
    ref_tokens = [t if (logp == ref_logp).all() else spread(lr, len(t), rng) for t, lr in zip(tokens, ref_logp, strict=True)]
    of = rng.integers(3, 7, n)
    return {
        "logp": logp.tolist(),
        "ref_logp": ref_logp.tolist(),
        "ref_logps": [ref_logp.tolist(), *(grid(ref_logp * rng.uniform(0.6, 1.3, (2, n))).tolist())],
        "length": [float(k) for k in length],
        "label": label,
        "owner": given.get("owner", [prompt.get(i, 0) for i in range(n)]),
        "chosen": chosen,
        "rejected": rejected,
        "partner_logratio": exact(given.get("partners", rng.normal(0.5, 1, n))),
        "reward": exact(given.get("reward", rng.uniform(0, 1, n))),
        "value": exact(given.get("value", rng.uniform(0, 1, n))),
        "token_logp": np.concatenate(tokens).tolist(),
        "ref_token_logp": np.concatenate(ref_tokens).tolist(),
        "token_value": exact(given.get("token_value", rng.uniform(-1, 1, m))),
        "collision": grid(logp - np.asarray(length) * rng.uniform(-2, 1.5, n)).tolist(),
        "anchor_logp": grid(given.get("anchor", rng.normal(-20, 5, len(chosen)))).tolist(),
        "anchor_ref_logp": grid(given.get("anchor", rng.normal(-20, 5, len(chosen)))).tolist(),
        "distance": exact(rng.uniform(0, 2, (sum(x > 0 for x in label), sum(x < 0 for x in label)))),
        "quantile": exact(rng.integers(0, of + 1) / of),
        "ref_rewards": of.astype(float).tolist(),
        "columns": {
            "epsilon": exact(rng.uniform(0, 0.5, n)),
            "margin": exact(rng.uniform(0, 2, n)),
            "win_probability": exact(rng.uniform(0, 1, n)),
            "weight": exact(rng.uniform(0.5, 2, n)),
            "other": exact(rng.uniform(0, 1, n)),
        },
        "state": given.get("state", {}),
        "step": 3,
    }


def make_cases() -> dict[str, Case]:
    """`random`; `below`: z0 clipped at 0, running statistics under way; `extreme`: log-ratios of +-1e3; `tied`: policy = reference and
    everything equal; `zero`; `single`: one pair; `alone`: one completion; `uneven`: completions in no pair, or without a label; `shared`: completions in two pairs."""
    rng = np.random.default_rng(7)
    n = 8
    lengths = rng.integers(2, 13, n)
    ref = -np.abs(rng.normal(30, 20, n)) - 5
    far = np.where(np.arange(n) % 3 == 0, -1e3, -0.25)
    flat = np.full(n, -12.5)
    under_way = {"bco": {"sum": 12.25, "count": 24.0}, "alpha_dpo": {"mean": 0.25, "deviation": 0.5, "steps": 3.0, "spread_steps": 2.0}}
    settled = {"alpha_dpo": {"mean": 0.01, "deviation": 0.0, "steps": 3.0, "spread_steps": 2.0}}  # the floor under the deviation
    no_spread = {"bco": under_way["bco"], "alpha_dpo": {"mean": 0.25, "deviation": 0.0, "steps": 2.0, "spread_steps": 0.0}}
    second = {"alpha_dpo": {"mean": 0.0, "deviation": 0.0, "steps": 1.0, "spread_steps": 1.0}}
    labels = [1.0, -1.0, -1.0, 1.0, 0.0, 1.0, -1.0, -1.0, 0.0]
    uneven = {"label": labels, "pairs": ([0, 3], [1, 6]), "owner": [0, 0, 0, 1, 1, 2, 1, 2, 0], "state": second}
    shared = {"label": [1.0, -1.0, -1.0, 1.0, 1.0, -1.0], "pairs": ([0, 0, 3, 4], [1, 2, 5, 2]), "owner": [0, 0, 0, 1, 0, 1]}
    none = {"reward": np.zeros(n), "value": np.zeros(n), "token_value": np.zeros(n), "anchor": np.zeros(n // 2)}
    half = {"reward": np.full(n, 0.5), "value": np.full(n, 0.5), "token_value": np.full(7 * n, 0.5), "anchor": np.full(n // 2, -20)}
    low = np.array([1, 1, 1, 0.01, 1, 0.01]) * rng.uniform(-20, -5, 6)  # a reference that is nearly sure of a pair
    return {
        "random": make_case(rng, np.minimum(ref + rng.normal(0, 6, n), -1), ref, lengths),
        "below": make_case(rng, np.minimum(ref + rng.normal(0, 2, n), -1), ref, lengths, partners=rng.normal(-3, 1, n), state=under_way),
        "extreme": make_case(rng, far, far[::-1], lengths, partners=[1e3, -990, 12, -2], reward=3 * rng.uniform(0, 1, n) - 1),
        "tied": make_case(rng, flat, flat, np.full(n, 7), partners=np.zeros(n), state=settled, **half),
        "zero": make_case(rng, np.zeros(n), np.zeros(n), np.ones(n, int), partners=np.zeros(n), **none),
        "single": make_case(rng, [-2.25, -9.5], [-3.0, -7.5], [1, 5], pairs=([0], [1]), state=no_spread),
        "alone": make_case(rng, [-7.25], [-8.0], [3], pairs=([], []), label=[1.0]),
        "uneven": make_case(rng, rng.uniform(-20, -5, 9), rng.uniform(-20, -5, 9), rng.integers(1, 6, 9), **uneven),
        "shared": make_case(rng, rng.uniform(-20, -5, 6), low, rng.integers(1, 6, 6), **shared),
    }


CASES = make_cases()


def fitted(name: str, case: Case) -> Case:
    """The case with as many references as the objective takes."""
    many = any(term.get("pairing") == "paper" for term in OBJECTIVES[name][0])
    return case if many else {**case, "ref_logps": case["ref_logps"][:2]}


@cache
def expected(name: str, case: str) -> dict[str, Any]:
    """What the oracle says of an objective on a case."""
    return oracle.objective(fitted(name, CASES[case]), *OBJECTIVES[name])


def raw_scores(case: Mapping[str, Any], count: Mapping[str, int] | None = None) -> Scores:
    """A case, or a part of a step with that step's counts, in NumPy; without running statistics."""
    given = {name: np.array(case[name], np.float64) for name in (*COMPLETION_LISTS, *TOKEN_LISTS, *PAIR_LISTS, "ref_logps") if name in case}
    given |= {name: np.array(case[name], np.float64) for name in ("partner_logratio", "distance") if name in case}
    owner = np.array(given.pop("owner", range(len(case["logp"]))), np.int64)
    label, length = given["label"], given["length"].astype(int)
    tokens = {"token_owner": np.repeat(np.arange(len(label)), length), "token_index": np.concatenate([np.arange(k) for k in length]) + 0.0}
    return Scores(
        **given,
        **(tokens if "token_logp" in given else {}),
        **{name: np.array(case[name], np.int64) for name in ("chosen", "rejected")},
        positive=np.flatnonzero(label > 0),
        negative=np.flatnonzero(label < 0),
        owner=owner,
        groups=len(set(owner.tolist())),
        count=dict(count or counts(case)),
        step=case.get("step", 0),
        columns={name: np.array(column, np.float64) for name, column in case.get("columns", {}).items()},
    )


def state_before(objective: Objective, case: Mapping[str, Any]) -> dict[str, float]:
    """The running statistics of the case, by the objective's own names."""
    state = dict(objective.initial_state())
    for key in state:
        _, loss, name = key.split(".")
        state[key] = case.get("state", {}).get(loss, {}).get(name, state[key])
    return state


def scores(i: Interpreter, case: Mapping[str, Any], count: Mapping[str, int] | None = None, objective: Objective | None = None) -> Scores:
    """The same as the interpreter's arrays; with an objective, whose running statistics take this step in."""
    raw = raw_scores(case, count)
    if objective is not None and objective.initial_state():
        raw = replace(raw, state=objective.advance(replace(raw, state=state_before(objective, case))))
    return raw.map(i.floats, i.indices)


def counts(case: Mapping[str, Any]) -> dict[str, int]:
    tokens = {i: int(case["length"][i]) for i, label in enumerate(case["label"]) if label > 0}
    return {
        "pair": len(case["chosen"]),
        "completion": len(case["logp"]),
        "chosen": len(tokens),
        "group": len(set(case.get("owner", range(len(case["logp"]))))),
        "token": int(sum(case["length"])),
        "chosen_token": sum(tokens.values()),
    }


def select(case: Case, kept: Sequence[int], pairs: Sequence[int]) -> Case:
    """These completions in this order and these pairs in this order: a permutation, a micro-batch; partners are the whole step's."""
    tokens = np.concatenate([int(sum(case["length"][:k])) + np.arange(int(case["length"][k])) for k in kept])
    rows, columns = ([i for i, x in enumerate(case["label"]) if sign * x > 0] for sign in (1, -1))
    at = [[side.index(k) for k in kept if k in side] for side in (rows, columns)]
    prompts = sorted({case["owner"][k] for k in kept})
    return {
        **case,
        **{name: [case[name][k] for k in kept] for name in COMPLETION_LISTS},
        **{name: np.array(case[name])[tokens].tolist() for name in TOKEN_LISTS},
        **{name: [case[name][p] for p in pairs] for name in PAIR_LISTS},
        **{name: [list(kept).index(case[name][p]) for p in pairs] for name in ("chosen", "rejected")},
        "owner": [prompts.index(case["owner"][k]) for k in kept],
        "ref_logps": [[row[k] for k in kept] for row in case["ref_logps"]],
        "distance": [[case["distance"][r][c] for c in at[1]] for r in at[0]],
        "columns": {name: [column[k] for k in kept] for name, column in case["columns"].items()},
    }


def members(case: Case, pairs: Sequence[int]) -> list[int]:
    """The completions of these pairs."""
    return sorted({case[side][p] for side in ("chosen", "rejected") for p in pairs})


def part(case: Case, pairs: Sequence[int]) -> Case:
    """A micro-batch of pairs with their completions."""
    return select(case, members(case, pairs), pairs)
