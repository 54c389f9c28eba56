"""What all losses have in common, whatever their formula; what a loss does not share is listed with the reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from interpreters import NAMES, Interpreter, close, interpreter
from loss_cases import CASES, COMPLETION_LISTS, Case, counts, exact, fitted, members, part, select
from loss_objectives import OBJECTIVES, build
from loss_runs import evaluate, gradients
from oracle.inputs import LEAVES

from upo.losses import Objective

# The first two pairs of `random` and `below` belong to one prompt, which no micro-batch divides.
PARTITION = [0, 1], [2], [3]
BY_TOKEN = {"cpo": "token", "cpo_simpo": "token"}
OWN_LIKELIHOOD = {  # losses with a reference that see log pi beside log pi - log ref
    "rpo": "the chosen completion's likelihood",
    "ld_dpo": "log-probs of tokens",
    "alpha_dpo": "the policy's own margin",
    "wpo": "how likely the policy is to write it",
    "aot": "margins of policy and reference sorted apart",
    "mrpo": "several references, clipped in proportion to the base",
    "a_lol": "likelihood",
    "a_lol_sequence": "log-probs of tokens",
    "dro_v": "the likelihood in its form `split`",
    "offline_ppo": "log-probs of tokens",
    "sft": "likelihood",
}
NOT_MONOTONE = {  # near the reference, more chosen likelihood need not lower the loss, nor more rejected raise it
    "apo_down": "lowers the chosen completion too",
    "discopop": "has a valley below D = 0",
    "csft": "imitates the rejected completion too, as an answer to another control text",
    "ada_dpo": "the temperature moves with the margin",
    "alpha_dpo": "the margin's z-score moves with it",
    "wpo": "the weight grows with the likelihood",
    "nemo_rpo": "draws the margin to a number",
    "qrpo": "draws the log-ratio to a number",
    "dro_v": "draws the log-ratio to a number",
    "exo_reward": "draws the distribution to that of the rewards",
    "a_lol": "knows rewards, not labels",
    "a_lol_sequence": "knows rewards, not labels",
    "offline_ppo": "knows rewards, not labels",
    "rosepo-0.3-other": "the column holds shares of flipped labels above one half",
    "sppo-column-0.05": "draws the log-ratio to a win probability",
    "sppo-column-other": "draws the log-ratio to a win probability",
}
MIRRORED = ["dpo", "robust", "ipo", "hinge", "discopop", "exo", "bco_pair", "apo_zero", "sppo", "cal_dpo", "dpo_norm", "aot", "aot_unpaired", "kto"]


def names(terms: list[dict[str, Any]]) -> set[str]:
    return {term["loss"] for term in terms}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("framework", NAMES)
def test_properties(framework: str, name: str) -> None:
    """The one routine that every objective passes."""
    i, (terms, auxiliary) = interpreter(framework), OBJECTIVES[name]
    objective = build(terms, auxiliary)
    for case in (fitted(name, CASES["random"]), fitted(name, CASES["below"])):
        permutation(i, objective, case)
        micro_batches(i, objective, case)
        nan_stays_nan(i, objective, case)
        if not objective.coupled and not any(term.get("nll", BY_TOKEN.get(term["loss"])) == "token" for term in terms):
            mean_of_singles(i, objective, case, "exo_reward" in names(terms))
        if not auxiliary and objective.needs >= {"reference"} and not names(terms) & {*OWN_LIKELIHOOD, "simpo"}:
            shift_invariance(i, objective, case)
    huge_is_finite(i, objective, fitted(name, CASES["random"]))
    if not auxiliary and name not in NOT_MONOTONE and not names(terms) & {*NOT_MONOTONE}:
        monotone(i, objective, fitted(name, CASES["tied"]))


def permutation(i: Interpreter, objective: Objective, case: Case) -> None:
    """The order of completions, of pairs and of partners does not matter; gradients move along."""
    order = np.random.default_rng(1).permutation(len(case["logp"])).tolist()
    pairs = np.random.default_rng(2).permutation(len(case["chosen"])).tolist()
    moved = {**select(case, order, pairs), "partner_logratio": case["partner_logratio"][::-1]}
    close(i, "value", evaluate(i, objective, moved)["loss"], evaluate(i, objective, case)["loss"])
    if i.differentiates:
        before, after = gradients(i, objective, case), gradients(i, objective, moved)
        for place in (LEAVES.index("logp"), LEAVES.index("value")):
            close(i, "gradient", after[place], before[place][order])


def micro_batches(i: Interpreter, objective: Objective, case: Case) -> None:
    """The shares of a partition are the step's value, term by term, and its gradient, unless a loss needs the step at once."""
    whole = evaluate(i, objective, case)
    parts = [part(case, pairs) for pairs in PARTITION]
    shares = [evaluate(i, objective, p, counts(case)) for p in parts]
    if objective.coupled:
        return
    for term, value in whole.items():
        close(i, "value", sum(share[term] for share in shares), value)
    if i.differentiates:
        logp, value = gradients(i, objective, case)[:2]
        for p, pairs in zip(parts, PARTITION, strict=True):
            found = gradients(i, objective, p, counts(case))
            close(i, "gradient", found[0], logp[members(case, pairs)])
            close(i, "gradient", found[1], value[members(case, pairs)])


def mean_of_singles(i: Interpreter, objective: Objective, case: Case, by_prompt: bool) -> None:
    """A step is the mean of the steps of its pairs, or of its prompts, alone."""
    singles = PARTITION if by_prompt else [[pair] for pair in range(len(case["chosen"]))]
    losses = [evaluate(i, objective, part(case, pairs))["loss"] for pairs in singles]
    close(i, "value", np.mean(losses), evaluate(i, objective, case)["loss"])


def nan_stays_nan(i: Interpreter, objective: Objective, case: Case) -> None:
    """A number that is missing is never hidden: what a loss needs of a completion enters it."""
    missing(i, objective, case, case["chosen"][1])
    if not all(term.loss.name == "sft" for term in objective.preference):
        missing(i, objective, case, case["rejected"][1])


def missing(i: Interpreter, objective: Objective, case: Case, k: int) -> None:
    """Of completion k, which is in pair 1."""
    start = int(sum(case["length"][:k]))
    spoil = lambda values, place: [float("nan") if n == place else x for n, x in enumerate(values)]  # noqa: E731
    broken = {"policy": {**case, "logp": spoil(case["logp"], k), "token_logp": spoil(case["token_logp"], start)}}
    references = {"ref_logps": [spoil(row, k) for row in case["ref_logps"]], "ref_token_logp": spoil(case["ref_token_logp"], start)}
    needs = objective.needs
    if "reference" in needs:
        broken["reference"] = {**case, **references, "ref_logp": spoil(case["ref_logp"], k)}
    for need, field, place in (
        ("rewards", "reward", k),
        ("value", "value", k),
        ("token_values", "token_value", start),
        ("collision", "collision", k),
        ("quantiles", "quantile", k),
        ("partners", "partner_logratio", 0),
        ("anchors", "anchor_logp", 1),
        ("anchors", "anchor_ref_logp", 1),
    ):
        if need in needs and not (need == "rewards" and "quantiles" in needs):  # rewards that only made the quantiles
            broken[field] = {**case, field: spoil(case[field], place)}
    by_completion = any(term.loss.unit == "completion" for term in objective.preference)
    for column in objective.columns if k in case["chosen"] or by_completion else ():  # a pair's is its chosen completion's
        broken[column] = {**case, "columns": {**case["columns"], column: spoil(case["columns"][column], k)}}
    for what, spoiled in broken.items():
        assert np.isnan(evaluate(i, objective, spoiled)["loss"]), what


def shift_invariance(i: Interpreter, objective: Objective, case: Case) -> None:
    """What policy and reference have in common does not matter, completion by completion."""
    shift = np.arange(len(case["logp"])) * -16.0
    moved = {**case, "logp": exact(np.array(case["logp"]) + shift), "ref_logp": exact(np.array(case["ref_logp"]) + shift)}
    close(i, "value", evaluate(i, objective, moved)["loss"], evaluate(i, objective, case)["loss"])


def huge_is_finite(i: Interpreter, objective: Objective, case: Case) -> None:
    """Log-ratios of a million, of either sign: finite value and gradient."""
    length = np.array(case["length"])
    for sign in (1.0, -1.0):
        low = np.array([-1e6 if sign * label < 0 else 0.0 for label in case["label"]])
        high = -1e6 - low
        huge = {
            **case,
            **{"logp": low.tolist(), "ref_logp": high.tolist(), "ref_logps": [high.tolist(), *([0.9 * high] * (len(case["ref_logps"]) - 1))]},
            "token_logp": np.repeat(low / length, length.astype(int)).tolist(),
            "ref_token_logp": np.repeat(high / length, length.astype(int)).tolist(),
            "collision": (-3 * length).tolist(),
            **{"anchor_logp": low[case["chosen"]].tolist(), "anchor_ref_logp": high[case["chosen"]].tolist()},
        }
        assert np.isfinite(evaluate(i, objective, huge)["loss"])
        if i.differentiates:
            assert all(np.isfinite(g).all() for g in gradients(i, objective, huge))


def monotone(i: Interpreter, objective: Objective, case: Case) -> None:
    """Within two nats of the reference, more chosen likelihood lowers the loss; more rejected likelihood raises it, if it is used."""
    start = evaluate(i, objective, {**case, "partner_logratio": [0.3]})["loss"]
    ignored = all(term.loss.unit == "chosen" and not term.loss.needs for term in objective.preference)
    for k, label in enumerate(case["label"]):
        first = int(sum(case["length"][:k]))
        more = {**case, "partner_logratio": [0.3], "logp": list(case["logp"]), "token_logp": list(case["token_logp"])}
        more["logp"][k] += 2.0
        more["token_logp"][first] += 2.0
        change = evaluate(i, objective, more)["loss"] - start
        assert change < 0 if label > 0 else change == 0 if ignored else change > 0, (k, label, change)


ZERO_SLOPE: dict[str, Any] = {  # loss, and its slope by a chosen and a rejected completion, at policy = reference; 4 pairs, 8 completions
    "dpo": (np.log(2), -0.05 / 4, 0.05 / 4),
    "dpo-0.3-0.1": (np.log(2), -0.3 * (0.5 - 0.1) / 4, 0.3 * (0.5 - 0.1) / 4),
    "robust": (np.log(2), -0.05 / (1 - 2 * 0.1) / 4, 0.05 / (1 - 2 * 0.1) / 4),
    "ipo-sum-0.2": (2.5**2, -5.0 / 4, 5.0 / 4),
    "hinge": (1.0, -0.1 / 4, 0.1 / 4),
    "minor_dpo": (np.log(2), -0.05 / 4, 0.0),  # the kink is at the start of every run: nothing pushes the rejected one yet
    "dpop": (np.log(2), -0.05 / 4, 0.05 / 4),
    "aot": (np.log(2), -0.005 / 4, 0.005 / 4),
    "nca": (2 * np.log(2), -0.0025 / 4, 0.0025 / 4),
    "kto": (0.5, -0.1 / 4 / 8, 0.1 / 4 / 8),
    "kto-0.2-1.33-0.5": (0.5 * (1.33 + 0.5) / 2, -1.33 * 0.2 / 4 / 8, 0.5 * 0.2 / 4 / 8),
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
        close(i, "gradient", gradients(i, objective, case)[0], [chosen if label > 0 else rejected for label in case["label"]])


@pytest.mark.parametrize("name", [name for name, (terms, auxiliary) in OBJECTIVES.items() if name.partition("-")[0] in MIRRORED and "column" not in name])
@pytest.mark.parametrize("framework", NAMES)
def test_swapping_mirrors(framework: str, name: str) -> None:
    """Exchanging chosen and rejected is the same as exchanging policy and reference (for KTO at z0 = 0, with the weights exchanged)."""
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
    assert abs(first - evaluate(i, build([term], None), case)["loss"]) > 1e-4


@pytest.mark.parametrize("framework", NAMES)
def test_a_step_without_a_unit_adds_nothing(framework: str) -> None:
    """Undesirable completions only, no pair: losses of pairs and of the chosen have nothing to average and do not turn the step into
    0 / 0; neither does a step of chosen completions only for a loss that compares them with others."""
    i = interpreter(framework)
    empty = {"chosen": [], "rejected": [], "anchor_logp": [], "anchor_ref_logp": []}
    bad = {**CASES["random"], **empty, "label": [-1.0] * 8, "distance": np.zeros((0, 8))}
    good = {**CASES["random"], **empty, "label": [1.0] * 8, "distance": np.zeros((8, 0))}
    for name, (terms, auxiliary) in OBJECTIVES.items():
        units = {term.loss.unit for term in build(terms, None).preference}
        if auxiliary or not units <= {"pair", "chosen"} or name == "two-states":
            continue
        for case in (bad, good) if "sft" not in names(terms) else (bad,):
            objective = build([*OBJECTIVES["kto"][0], *terms], None)
            alone = build(OBJECTIVES["kto"][0], None)
            given = fitted(name, case)
            assert evaluate(i, objective, given)["loss"] == evaluate(i, alone, given)["loss"], name
            if i.differentiates:
                np.testing.assert_array_equal(gradients(i, objective, given)[0], gradients(i, alone, given)[0], err_msg=name)


@pytest.mark.parametrize("name", [name for name, (terms, _) in OBJECTIVES.items() if build(terms, None).coupled])
def test_coupled_losses_are_coupled(name: str) -> None:
    """Nobody pays for a second pass in vain: the shares of micro-batches differ, or the loss keeps running statistics of whole steps."""
    i, (terms, _) = interpreter("numpy"), OBJECTIVES[name]
    objective = build(terms, None)
    case = {**CASES["random"], "ref_logp": CASES["random"]["ref_logp"][::-1]}  # policy and reference rank the pairs differently
    shares = [evaluate(i, objective, part(case, pairs), counts(case))["loss"] for pairs in PARTITION]
    assert objective.initial_state() or abs(sum(shares) - evaluate(i, objective, case)["loss"]) > 1e-4


def test_the_lists_of_exceptions_are_kept() -> None:
    known = {term["loss"] for terms, _ in OBJECTIVES.values() for term in terms} | set(OBJECTIVES)
    assert {*OWN_LIKELIHOOD, *NOT_MONOTONE, *MIRRORED, *ZERO_SLOPE} <= known
    assert {"logp", "ref_logp"} <= set(COMPLETION_LISTS)
