"""Every loss and objective on every interpreter: values and gradients of the oracle, and the properties all of them share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from interpreters import NAMES, Interpreter, close, interpreter
from loss_cases import CASES, OBJECTIVES, Case, build, counts, exact, part, scores
from oracle import step as oracle

from upo.losses import LOSSES, Objective

TERMS = ("preference", "auxiliary", "value")


def evaluate(i: Interpreter, objective: Objective, case: Case, count: dict[str, int] | None = None) -> dict[str, float]:
    return {name: float(i.numpy(x)) for name, x in objective(i.ops, scores(i, case, count)).items()}


def gradient(i: Interpreter, objective: Objective, case: Case, count: dict[str, int] | None = None) -> list[np.ndarray]:
    """Of the loss by logp and by value."""
    given = scores(i, case, count)
    return i.gradient(lambda logp, value: objective(i.ops, replace(given, logp=logp, value=value))["loss"], [case["logp"], case["value"]])


def test_every_loss_has_an_oracle() -> None:
    assert set(oracle.LOSSES) == set(LOSSES)
    assert {term["loss"] for terms, _ in OBJECTIVES.values() for term in terms} == set(LOSSES)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("framework", NAMES)
def test_equals_the_oracle(framework: str, name: str, case: str) -> None:
    i = interpreter(framework)
    expected = oracle.objective(CASES[case], *OBJECTIVES[name])
    objective = build(*OBJECTIVES[name])
    found = evaluate(i, objective, CASES[case])
    close(i, "value", found["loss"], expected["loss"])
    for term in TERMS:
        if f"loss/{term}" in found:
            close(i, "value", found[f"loss/{term}"], expected[term])
    if i.differentiates:
        logp, value = gradient(i, objective, CASES[case])
        close(i, "gradient", logp, expected["gradient"]["logp"])
        close(i, "gradient", value, expected["gradient"].get("value", np.zeros(len(value))))


# --- Properties -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("framework", NAMES)
def test_properties(framework: str, name: str) -> None:
    """The one routine that every loss passes; what a loss does not claim is decided by what it declares."""
    i, objective = interpreter(framework), build(*OBJECTIVES[name])
    for case in (CASES["random"], CASES["below"]):
        permutation(i, objective, case)
        micro_batches_add_up(i, objective, case)
        nan_stays_nan(i, objective, case)
        if not objective.auxiliary and objective.needs >= {"reference"} and len(objective.preference) == 1:
            shift_invariance(i, objective, case)
    huge_is_finite(i, objective)
    if not objective.auxiliary:
        monotone(i, objective)


def permutation(i: Interpreter, objective: Objective, case: Case) -> None:
    """The order of completions, of pairs and of partners does not matter."""
    order = np.random.default_rng(1).permutation(len(case["logp"]))
    pairs = np.random.default_rng(2).permutation(len(case["chosen"]))
    where = np.argsort(order)
    moved = {
        **case,
        **{k: np.array(case[k])[order].tolist() for k in ("logp", "ref_logp", "length", "label", "reward", "value")},
        **{k: where[np.array(case[k])[pairs]].tolist() for k in ("chosen", "rejected")},
        "partner_logratio": case["partner_logratio"][::-1],
    }
    close(i, "value", evaluate(i, objective, moved)["loss"], evaluate(i, objective, case)["loss"])


def micro_batches_add_up(i: Interpreter, objective: Objective, case: Case) -> None:
    """The shares of a partition are the step's value, term by term, and its gradient."""
    partition = [0, 3], [1], [2]
    whole = evaluate(i, objective, case)
    parts = [part(case, pairs) for pairs in partition]
    shares = [evaluate(i, objective, p, counts(case)) for p in parts]
    for term, value in whole.items():
        close(i, "value", sum(share[term] for share in shares), value)
    if i.differentiates:
        logp, value = gradient(i, objective, case)
        for p, pairs in zip(parts, partition, strict=True):
            kept = sorted(case["chosen"][k] for k in pairs) + sorted(case["rejected"][k] for k in pairs)
            found = gradient(i, objective, p, counts(case))
            close(i, "gradient", found[0], logp[kept])
            close(i, "gradient", found[1], value[kept])


def nan_stays_nan(i: Interpreter, objective: Objective, case: Case) -> None:
    """A score that is not a number is never hidden: each chosen completion enters every loss."""
    broken = {**case, "logp": [float("nan") if k == case["chosen"][1] else x for k, x in enumerate(case["logp"])]}
    assert np.isnan(evaluate(i, objective, broken)["loss"])
    if "partners" in objective.needs:
        assert np.isnan(evaluate(i, objective, {**case, "partner_logratio": [0.0, float("nan")]})["loss"])


def shift_invariance(i: Interpreter, objective: Objective, case: Case) -> None:
    """What policy and reference have in common does not matter, completion by completion."""
    shift = np.arange(len(case["logp"])) * -16.0
    moved = {**case, "logp": exact(np.array(case["logp"]) + shift), "ref_logp": exact(np.array(case["ref_logp"]) + shift)}
    # float32 holds the shifted numbers to 1e-5, so the comparison is with the shifted numbers' own log-ratio
    unshifted = {**case, "logp": (np.array(moved["logp"]) - moved["ref_logp"]).tolist(), "ref_logp": [0.0] * len(shift)}
    close(i, "value", evaluate(i, objective, moved)["loss"], evaluate(i, objective, unshifted)["loss"])


def huge_is_finite(i: Interpreter, objective: Objective) -> None:
    """Log-ratios of a million, of either sign: finite value and gradient."""
    for sign in (1.0, -1.0):
        case = CASES["random"]
        huge = {**case, "logp": [sign * label * 1e6 for label in case["label"]], "ref_logp": [0.0] * len(case["label"])}
        assert np.isfinite(evaluate(i, objective, huge)["loss"])
        if i.differentiates:
            assert all(np.isfinite(g).all() for g in gradient(i, objective, huge))


def monotone(i: Interpreter, objective: Objective) -> None:
    """Within two nats of the reference, more chosen likelihood lowers the loss; more rejected likelihood raises it, if it is used."""
    case = {**CASES["tied"], "partner_logratio": [0.3]}
    start = evaluate(i, objective, case)["loss"]
    for k, label in enumerate(case["label"]):
        more = {**case, "logp": [x + 2.0 * (j == k) for j, x in enumerate(case["logp"])]}
        change = evaluate(i, objective, more)["loss"] - start
        assert change < 0 if label > 0 else change > 0 or not objective.needs


ZERO_SLOPE: dict[str, Any] = {  # dL / dlogp of a chosen and of a rejected completion at policy = reference; 4 pairs, 8 completions
    "dpo": (np.log(2), -0.05 / 4, 0.05 / 4),
    "dpo-smooth": (np.log(2), -0.3 * (0.5 - 0.1) / 4, 0.3 * (0.5 - 0.1) / 4),
    "kto": (0.5, -0.1 / 4 / 8, 0.1 / 4 / 8),
    "kto-weights": (0.5 * (1.33 + 0.5) / 2, -1.33 * 0.2 / 4 / 8, 0.5 * 0.2 / 4 / 8),
    "sft": (12.5 / 7, -1 / 7 / 4, 0.0),
}


@pytest.mark.parametrize("name", ZERO_SLOPE)
@pytest.mark.parametrize("framework", NAMES)
def test_zero_margin(framework: str, name: str) -> None:
    """Every example of a LoRA run's first step sits here: value and slope are the closed forms."""
    i, objective, case = interpreter(framework), build(*OBJECTIVES[name]), CASES["tied"]
    value, chosen, rejected = ZERO_SLOPE[name]
    close(i, "value", evaluate(i, objective, case)["loss"], value)
    if i.differentiates:
        close(i, "gradient", gradient(i, objective, case)[0], [chosen if label > 0 else rejected for label in case["label"]])


@pytest.mark.parametrize("name", ["dpo", "dpo-smooth", "kto", "kto-weights"])
@pytest.mark.parametrize("framework", NAMES)
def test_swapping_mirrors(framework: str, name: str) -> None:
    """Exchanging chosen and rejected is the same as exchanging policy and reference (at z0 = 0, with the weights exchanged)."""
    i = interpreter(framework)
    case = {**CASES["random"], "partner_logratio": [0.0]}
    swapped = {**case, "chosen": case["rejected"], "rejected": case["chosen"], "label": [-x for x in case["label"]]}
    mirrored = {**case, "logp": case["ref_logp"], "ref_logp": case["logp"]}
    (term,), _ = OBJECTIVES[name]
    other = dict(term)
    if "desirable_weight" in term:
        other |= {"desirable_weight": term["undesirable_weight"], "undesirable_weight": term["desirable_weight"]}
    first, second = evaluate(i, build([term], None), swapped)["loss"], evaluate(i, build([other], None), mirrored)["loss"]
    close(i, "value", first, second)
    assert abs(first - evaluate(i, build([term], None), case)["loss"]) > 1e-3


@pytest.mark.parametrize("framework", NAMES)
def test_a_step_without_a_unit_adds_nothing(framework: str) -> None:
    """Undesirable completions only, no pair: DPO and SFT have nothing to average and must not turn the step into 0 / 0."""
    i = interpreter(framework)
    case = {**CASES["random"], "chosen": [], "rejected": [], "label": [-1.0] * 8}
    kto = build(*OBJECTIVES["kto"])
    mixed = build([*OBJECTIVES["kto"][0], {"loss": "dpo"}, {"loss": "sft"}], None)
    assert evaluate(i, mixed, case)["loss"] == evaluate(i, kto, case)["loss"] > 0
    if i.differentiates:
        np.testing.assert_array_equal(gradient(i, mixed, case)[0], gradient(i, kto, case)[0])
