"""The objectives that are compared with the oracle: every loss with its defaults, every value of every option, and mixtures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from upo.losses import Auxiliary, Objective, Term, build_loss

AUXILIARY = {"gamma": 0.5, "temperature": 5.0, "value_coef": 0.1, "expectile": 0.7}
VARIANTS: dict[str, Sequence[dict[str, Any]]] = {  # options of every loss; {} are the defaults, which the oracle has its own copy of
    "dpo": [{}, {"beta": 0.3, "label_smoothing": 0.1}],
    "robust": [{}, {"beta": 0.4, "label_smoothing": 0.3}],
    "ipo": [{}, {"average": "sum", "beta": 0.2}],
    "hinge": [{}, {"beta": 0.5}],
    "rosepo": [{}, {"beta": 0.3, "epsilon": "other"}],
    "odpo": [{}, {"beta": 0.3, "margin": "other"}],
    "rpo": [{}, {"nll": "token", "alpha": 0.3, "beta": 0.2}],
    "discopop": [{}, {"beta": 0.1, "temperature": 0.5}],
    "exo": [{}, {"target": "code", "epsilon": 0.02, "beta": 0.3}, {"epsilon": 0.2}],
    "nca": [{}, {"beta": 0.3}],
    "bco_pair": [{}, {"beta": 0.3}],
    "apo_zero": [{}, {"beta": 0.3}],
    "apo_down": [{}, {"beta": 0.3}],
    "sppo": [{}, {"targets": "column", "beta": 0.05}, {"targets": "column", "win_probability": "other"}],
    "cal_dpo": [{}, {"beta": 0.3}],
    "f_dpo": [
        {},
        {"divergence": "forward_kl", "beta": 0.2},
        {"divergence": "js", "beta": 0.3},
        {"divergence": "alpha"},
        {"divergence": "alpha", "alpha": 1.0},
        {"divergence": "alpha", "alpha": 2.5, "beta": 0.01},
    ],
    "dpo_norm": [{}, {"beta": 3.0}],
    "ld_dpo": [{}, {"reference": "policy", "alpha": 0.3, "beta": 0.3}, {"alpha": 1.0}],
    "dpop": [{}, {"penalty": 5.0, "beta": 0.3}],
    "minor_dpo": [{}, {"beta": 0.3}],
    "ada_dpo": [
        {},
        {"penalty": "quadratic", "beta": 0.5},
        {"beta": 0.2, "rho": 0.3, "tau_min": 0.5, "tau_max": 2.0, "newton_steps": 2},
        {"beta": 0.05, "rho": 0.5, "tau_max": 1.25, "newton_steps": 1, "penalty": "quadratic"},
    ],
    "alpha_dpo": [{}, {"form": "code", "gamma": 0.6, "alpha": 0.2, "label_smoothing": 0.1, "beta": 1.5}, {"gamma": 0.1, "alpha": 0.4}],
    "wpo": [{}, {"clamp": "none", "beta": 0.1}],
    "aot": [{}, {"beta": 0.3, "label_smoothing": 0.2}],
    "aot_unpaired": [{}, {"beta": 0.3, "label_smoothing": 0.2}],
    "relative_po": [{}, {"beta": 0.7, "tau": 0.2}],
    "relative_po_diagonal": [{}, {"beta": 0.3, "diagonal": 0.3}],
    "mrpo": [{}, {"pairing": "paper", "eta": 0.4, "beta": 0.3}],
    "bapo": [{}, {"form": "inside", "penalty": 0.3, "beta": 0.3}],
    "simpo": [{}, {"beta": 4.0, "gamma_beta_ratio": 0.5, "label_smoothing": 0.1}],
    "cpo": [{}, {"nll": "sequence", "alpha": 0.3, "beta": 0.3}],
    "cpo_simpo": [{}, {"nll": "sequence", "alpha": 0.3, "gamma_beta_ratio": 0.5, "beta": 3.0}],
    "orpo": [{}, {"nll": "token", "odds_weight": 0.7}],
    "asft": [{}, {"beta": 0.5, "odds_weight": 0.3, "nll_weight": 0.7}],
    "slic": [{}, {"delta": 5.0, "nll_weight": 0.4}],
    "kto": [{}, {"beta": 0.2, "desirable_weight": 1.33, "undesirable_weight": 0.5}],
    "apo_zero_unpaired": [{}, {"beta": 0.3}],
    "bco": [{}, {"beta": 0.3}],
    "nemo_rpo": [{}, {"form": "forward_kl", "eta": 2.0}, {"form": "squared", "eta": 0.5, "beta": 0.1}],
    "modpo": [{}, {"form": "hinge", "label_weight": 0.9, "beta": 0.3}],
    "qrpo": [{}, {"transform": "identity", "beta": 0.3}, {"transform": "identity", "partition": "exact", "beta": 0.5}],
    "exo_reward": [{}, {"form": "forward", "beta": 0.2, "reward_temperature": 0.8}],
    "a_lol": [{}, {"form": "reference_free"}, {"form": "kl", "kl_weight": 0.4}, {"clip": 0.3}],
    "a_lol_sequence": [{}, {"clip": 0.3}],
    "dro_v": [{}, {"form": "split", "tau": 0.5}, {"tau": 0.25}],
    "offline_ppo": [{}, {"form": "main", "clip": 0.2, "kl_coef": 0.3, "value_coef": 0.5, "discount": 0.9, "trace": 0.8}, {"clip": 0.8}],
    "sft": [{}],
    "csft": [{}],
}
MPO = [{"loss": "dpo", "weight": 0.8}, {"loss": "bco_pair", "weight": 0.2}, {"loss": "sft", "weight": 1.0}]
OBJECTIVES: dict[str, tuple[list[dict[str, Any]], dict[str, Any] | None]] = {
    **{
        "-".join([loss, *(str(v) for v in options.values())]): ([{"loss": loss, **options}], None)
        for loss, variants in VARIANTS.items()
        for options in variants
    },
    "mpo": (MPO, None),
    "two-states": ([{"loss": "bco", "weight": 0.5}, {"loss": "alpha_dpo"}, {"loss": "bco", "beta": 0.4}], None),
    "weighted-pairs": ([{"loss": "dpo", "weight_column": "weight", "weight": 0.5}, {"loss": "simpo"}], None),
    "weighted-completions": ([{"loss": "qrpo", "weight_column": "weight"}], None),
    "weighted-chosen": ([{"loss": "sft", "weight_column": "weight", "weight": 2.0}], None),
    "upo": ([{"loss": "kto"}], AUXILIARY),
    "upo-dpo": ([{"loss": "dpo"}], {**AUXILIARY, "gamma": 3.0, "expectile": 0.5}),
    "upo-warmup": ([{"loss": "kto"}], {**AUXILIARY, "actor_warmup_steps": 4}),
    "upo-mpo": (MPO, AUXILIARY),
    "upo-aot": ([{"loss": "aot", "weight": 0.3}], AUXILIARY),
    "upo-bco": ([{"loss": "bco"}], AUXILIARY),
    "upo-dro": ([{"loss": "dro_v", "form": "split"}], AUXILIARY),
    "upo-ppo": ([{"loss": "offline_ppo"}], AUXILIARY),
    "auxiliary": ([], {**AUXILIARY, "temperature": 0.0}),
}
LABELLED_ONLY = ("kto", "apo_zero_unpaired", "bco")  # of which a completion without a label has no value


def applies(name: str, case: str) -> bool:
    """Whether the objective is defined on the case. `uneven` has completions without a label, and desirable ones without a pair; in
    `shared` a completion is in two pairs. The NLL by tokens takes every desirable completion to be in one pair, and `ld_dpo` in one at
    most, as rows of pairs have it."""
    terms = OBJECTIVES[name][0]
    if case not in ("uneven", "shared"):
        return True
    if any(term.get("nll", {"cpo": "token", "cpo_simpo": "token"}.get(term["loss"])) == "token" for term in terms):
        return False
    return not any(term["loss"] in (LABELLED_ONLY if case == "uneven" else ("ld_dpo",)) for term in terms)


def build(terms: Sequence[Mapping[str, Any]], auxiliary: Mapping[str, Any] | None) -> Objective:
    """The library's objective for the oracle's description of it."""
    own = ("loss", "weight", "weight_column")
    losses = [build_loss(term["loss"], **{k: v for k, v in term.items() if k not in own}) for term in terms]
    given = [(float(term.get("weight", 1.0)), term.get("weight_column")) for term in terms]
    return Objective(
        tuple(Term(loss, *weights) for loss, weights in zip(losses, given, strict=True)), Auxiliary(**auxiliary) if auxiliary else None
    )
