"""The objective of a whole optimizer step and its gradients, in mpmath with 50 digits. Imports nothing of the library.

Cases are those of `inputs.py`. Terms are dicts {loss, weight, weight_column, options...}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mpmath as mp
from oracle import adaptive, batchwise, offline, pairwise, reference_free, reshaped, unpaired
from oracle import auxiliary as aux
from oracle.inputs import LEAVES, Step
from oracle.tape import DIGITS, gradient, mean, plain

Case = Mapping[str, Any]
PAIR: dict[str, Callable[..., list[Any]]] = {
    **{f.__name__: f for f in (pairwise.dpo, pairwise.robust, pairwise.ipo, pairwise.hinge, pairwise.rosepo, pairwise.odpo, pairwise.rpo)},
    **{f.__name__: f for f in (pairwise.discopop, pairwise.exo, pairwise.nca, pairwise.bco_pair, pairwise.apo_zero, pairwise.apo_down)},
    **{f.__name__: f for f in (pairwise.sppo, reshaped.f_dpo, reshaped.dpo_norm, reshaped.ld_dpo, reshaped.dpop, reshaped.minor_dpo)},
    **{f.__name__: f for f in (reshaped.cal_dpo, reshaped.bapo, reshaped.nemo_rpo, reshaped.modpo, adaptive.ada_dpo, adaptive.wpo)},
    **{f.__name__: f for f in (adaptive.alpha_dpo, adaptive.mrpo, batchwise.aot, batchwise.aot_unpaired, batchwise.relative_po_diagonal)},
    **{f.__name__: f for f in (reference_free.simpo, reference_free.cpo, reference_free.cpo_simpo, reference_free.orpo)},
    **{f.__name__: f for f in (reference_free.asft, reference_free.slic)},
}
COMPLETION: dict[str, Callable[..., list[Any]]] = {
    f.__name__: f for f in (unpaired.csft, unpaired.kto, unpaired.apo_zero_unpaired, unpaired.bco, unpaired.qrpo, offline.a_lol, offline.a_lol_sequence, offline.dro_v)
}
CHOSEN = {"sft": unpaired.sft, "relative_po": batchwise.relative_po}
LOSSES = {**PAIR, **COMPLETION, **CHOSEN, "offline_ppo": offline.offline_ppo, "exo_reward": unpaired.exo_reward}


def values(step: Step, term: Mapping[str, Any]) -> list[Any]:
    """One per unit, weighted by the term's column, if it names one: that of the chosen completion for a pair."""
    name, column = term["loss"], term.get("weight_column")
    found = LOSSES[name](step, **{k: v for k, v in term.items() if k not in ("loss", "weight", "weight_column")})
    if column is None:
        return found
    rows = [w for w, _ in step.pairs] if name in PAIR else step.all() if name in COMPLETION else step.positive
    return [step.columns[column][i] * value for i, value in zip(rows, found, strict=True)]


def preference_term(step: Step, terms: Sequence[Mapping[str, Any]]) -> tuple[Any, Any]:
    """The weighted sum of the terms' means, and that of the means of the values' sizes."""
    loss = size = mp.mpf(0)
    for term in terms:
        weight, found = mp.mpf(term.get("weight", 1.0)), values(step, term)
        loss, size = loss + weight * mean(found), size + weight * mean([abs(plain(value)) for value in found])
    return loss, size


def auxiliary_terms(step: Step, options: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """Actor and value loss per completion; the weights are constants."""
    rows = list(zip(step.reward, step.value, step.logp, step.length, strict=True))
    waiting = step.number < options.get("actor_warmup_steps", 0)
    weights = [mp.mpf(0) if waiting else aux.weight(r, plain(v), mp.mpf(options["temperature"])) for r, v, _, _ in rows]
    actors = [aux.actor(lp, n, w) for (_, _, lp, n), w in zip(rows, weights, strict=True)]
    return actors, [aux.expectile(r, v, mp.mpf(options["expectile"])) for r, v, _, _ in rows]


def objective(case: Case, terms: Sequence[Mapping[str, Any]], auxiliary: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """loss, its terms preference, auxiliary and value, and the gradient by every leaf that the loss depends on; floats.

    `size` is the mean size of the values that the loss is the mean of: a float32 sum is exact to 2^-24 of it, however small it is.
    """
    with mp.workdps(DIGITS):
        step = Step(case)
        loss, size = preference_term(step, terms)
        found = {"preference": loss}
        if auxiliary is not None:
            actors, value = auxiliary_terms(step, auxiliary)
            found |= {"auxiliary": mean(actors), "value": mean(value)}
            loss = aux.upo(loss, actors, value, mp.mpf(auxiliary["gamma"]), mp.mpf(auxiliary["value_coef"]))
        slopes = {name: gradient(loss, leaves) for name, leaves in step.leaves().items()}
        return {
            "loss": float(plain(loss)),
            **{name: float(plain(term)) for name, term in found.items()},
            "size": float(size),
            "gradient": {name: slopes[name] for name in LEAVES if any(slopes.get(name, ()))},
        }


def state(case: Case, term: Mapping[str, Any]) -> dict[str, float]:
    """The running statistics of a term with this step taken in."""
    with mp.workdps(DIGITS):
        step = Step(case)
        after = adaptive.advance_alpha_dpo(step) if term["loss"] == "alpha_dpo" else unpaired.advance_bco(step, term.get("beta", 0.1))
        return {name: float(x) for name, x in after.items()}
