"""The objective of a whole optimizer step and its gradient, in mpmath with 50 digits. Imports nothing of the library.

A case is a dict of plain lists: logp, ref_logp, length, label (+1, -1), reward, value for N completions; chosen, rejected: indices of
the P pairs; partner_logratio: log-ratios of KTO's mismatched completions; step. Terms are dicts {loss, weight, options...}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mpmath as mp
from oracle import auxiliary as aux
from oracle import preference

Case = Mapping[str, Any]
DIGITS = 50


def _dpo(case: Case, logp: Sequence[Any], beta: float = 0.1, label_smoothing: float = 0.0) -> list[Any]:
    ref = case["ref_logp"]
    pairs = zip(case["chosen"], case["rejected"], strict=True)
    return [preference.dpo(logp[w], logp[l], mp.mpf(ref[w]), mp.mpf(ref[l]), mp.mpf(beta), mp.mpf(label_smoothing)) for w, l in pairs]


def _kto(case: Case, logp: Sequence[Any], beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> list[Any]:
    z0 = preference.reference_point([mp.mpf(g) for g in case["partner_logratio"]])
    rows = zip(logp, case["ref_logp"], case["label"], strict=True)
    weights = mp.mpf(desirable_weight), mp.mpf(undesirable_weight)
    return [preference.kto(lp, mp.mpf(lr), label > 0, z0, mp.mpf(beta), *weights) for lp, lr, label in rows]


def _sft(case: Case, logp: Sequence[Any]) -> list[Any]:
    return [preference.sft(lp, mp.mpf(n)) for lp, n, label in zip(logp, case["length"], case["label"], strict=True) if label > 0]


LOSSES = {"dpo": _dpo, "kto": _kto, "sft": _sft}


def mean(values: Sequence[Any]) -> Any:
    return sum(values, mp.mpf(0)) / len(values)


def preference_term(case: Case, terms: Sequence[Mapping[str, Any]], logp: Sequence[Any]) -> Any:
    total = mp.mpf(0)
    for term in terms:
        options = {k: v for k, v in term.items() if k not in ("loss", "weight")}
        total += mp.mpf(term.get("weight", 1.0)) * mean(LOSSES[term["loss"]](case, logp, **options))
    return total


def auxiliary_terms(case: Case, options: Mapping[str, Any], logp: Sequence[Any], value: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Actor and value loss per completion; the weights are taken at the case's own V, whatever `value` is."""
    reward = [mp.mpf(r) for r in case["reward"]]
    weights = [aux.weight(r, mp.mpf(v), mp.mpf(options["temperature"])) for r, v in zip(reward, case["value"], strict=True)]
    if case.get("step", 0) < options.get("actor_warmup_steps", 0):
        weights = [mp.mpf(0)] * len(weights)
    actors = [aux.actor(lp, mp.mpf(n), w) for lp, n, w in zip(logp, case["length"], weights, strict=True)]
    return actors, [aux.expectile(r, v, mp.mpf(options["expectile"])) for r, v in zip(reward, value, strict=True)]


def objective(case: Case, terms: Sequence[Mapping[str, Any]], auxiliary: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """loss, its terms preference, auxiliary and value, and the gradients logp [N] and, with an auxiliary term, value [N]; floats."""
    with mp.workdps(DIGITS):
        logp, value = [mp.mpf(x) for x in case["logp"]], [mp.mpf(x) for x in case.get("value", ())]

        def parts(logp: Sequence[Any], value: Sequence[Any]) -> dict[str, Any]:
            first = preference_term(case, terms, logp)
            if auxiliary is None:
                return {"loss": first, "preference": first}
            actors, values = auxiliary_terms(case, auxiliary, logp, value)
            total = aux.upo(first, actors, values, mp.mpf(auxiliary["gamma"]), mp.mpf(auxiliary["value_coef"]))
            return {"loss": total, "preference": first, "auxiliary": mean(actors), "value": mean(values)}

        def slope(values: list[Any], i: int, total: Any) -> float:
            return float(mp.chop(mp.diff(lambda x: total([*values[:i], x, *values[i + 1 :]]), values[i]), tol=1e-30))

        found: dict[str, Any] = {name: float(x) for name, x in parts(logp, value).items()}
        gradient = {"logp": [slope(logp, i, lambda a: parts(a, value)["loss"]) for i in range(len(logp))]}
        if auxiliary is not None:
            gradient["value"] = [slope(value, i, lambda a: parts(logp, a)["loss"]) for i in range(len(value))]
        return {**found, "gradient": gradient}
