"""The loss specification in NumPy: golden values, needs, documentation, metrics."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from interpreters import interpreter
from loss_cases import CASES, fitted, raw_scores, scores
from loss_objectives import OBJECTIVES, VARIANTS, build
from loss_runs import implicit_reward
from oracle import step as oracle

from upo.losses import FAMILIES, LOSSES, build_loss, loss_options
from upo.losses.base import NEEDS

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "losses.json").read_text())
GOLDEN_CASES = {case["name"]: case for case in GOLDEN["cases"]}


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_golden(name: str) -> None:
    """The recorded numbers are the oracle's to the last digit, what others published to 8 decimals, and what NumPy computes."""
    case = GOLDEN_CASES[name]
    step = {**GOLDEN["step"], **case["changes"]}
    again = oracle.objective(step, case["terms"], case["auxiliary"])
    assert {key: value for key, value in again.items() if key != "size"} == case["expected"]
    for term, value in case["published"].items():
        assert round(case["expected"][term], 8) == round(value, 8)
    i, objective = interpreter("numpy"), build(case["terms"], case["auxiliary"])
    found = objective(i.ops, scores(i, step, objective=objective))
    for term, value in found.items():
        assert value == pytest.approx(case["expected"][term.removeprefix("loss/")], rel=1e-14, abs=1e-15)
    assert case["source"]


def test_golden_covers_every_loss() -> None:
    assert {term["loss"] for case in GOLDEN_CASES.values() for term in case["terms"]} == set(LOSSES)


# --- Documentation ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_documents_itself(name: str) -> None:
    """`upo losses NAME` prints the docstring: a line that says what it is, the formula, every option and every choice; and a paper."""
    loss = LOSSES[name]
    text = loss.__doc__ or ""
    title, _, rest = text.partition("\n\n")
    assert title.strip().endswith(".") and "\n" not in title.strip()
    assert re.search(r"\bL(_[it]|\(y\))? +=", rest)
    assert [option for option in loss_options(loss) if option not in rest] == []
    choices = {value for variant in VARIANTS[name] for value in variant.values() if isinstance(value, str) and value != "other"}
    assert [choice for choice in choices if choice not in rest] == []
    assert "value per" in " ".join(rest.split())  # the unit and the shape
    assert loss.name == name and loss.source and loss.data
    unit = {"pair": "pair, [P]", "completion": "completion, [N]", "chosen": "completion, [", "group": "prompt, [R]", "token": "token, [M]"}[loss.unit]
    assert unit in " ".join(rest.split())


def test_sources_are_citations() -> None:
    """An arXiv identifier wherever there is a paper."""
    without = [name for name, loss in LOSSES.items() if "arXiv" not in loss.source]
    assert set(without) <= {"sft"}


def test_reconstructed_formulas_say_so() -> None:
    assert "-style" in (LOSSES["bapo"].__doc__ or "")
    for name in ("rosepo", "dro_v"):
        assert "reconstructed" in (LOSSES[name].__doc__ or "").lower(), name


# --- What a loss needs ------------------------------------------------------------------------------------------------------------

REFERENCE = {"reference"}
NEEDED: dict[str, set[str]] = {
    **{name: set() for name in ("simpo", "cpo", "cpo_simpo", "orpo", "asft", "slic", "sft")},
    "csft": {"control"},
    "ld_dpo": {"reference", "tokens"},
    "wpo": {"reference", "collision"},
    "mrpo": {"reference", "references"},
    "bapo": {"reference", "anchors"},
    "relative_po": {"reference", "distance"},
    "nemo_rpo": {"reference", "rewards"},
    "modpo": {"reference", "rewards"},
    "kto": {"reference", "partners"},
    "qrpo": {"reference", "rewards", "quantiles"},
    "exo_reward": {"reference", "rewards"},
    "a_lol": {"reference", "rewards", "value"},
    "a_lol_sequence": {"reference", "rewards", "value", "tokens"},
    "dro_v": {"reference", "rewards", "value"},
    "offline_ppo": {"reference", "rewards", "tokens", "token_values"},
}
FIELDS = {  # what a need brings
    "reference": ("ref_logp", "ref_token_logp"),
    "references": ("ref_logps",),
    "partners": ("partner_logratio",),
    "rewards": ("reward",),
    "value": ("value",),
    "tokens": ("token_logp", "token_owner", "token_index", "ref_token_logp"),
    "token_values": ("token_value",),
    "collision": ("collision",),
    "anchors": ("anchor_logp", "anchor_ref_logp"),
    "distance": ("distance",),
    "control": (),
    "quantiles": ("quantile", "ref_rewards"),
}
# Needed to make another field: the list of references, the quantiles; the completions themselves.
INDIRECT = {("mrpo", "reference"), ("qrpo", "rewards"), ("csft", "control")}
UNITS = {
    **dict.fromkeys(("kto", "apo_zero_unpaired", "bco", "qrpo", "a_lol", "a_lol_sequence", "dro_v", "csft"), "completion"),
    **{"sft": "chosen", "relative_po": "chosen", "exo_reward": "group", "offline_ppo": "token"},
}
COUPLED = {"aot", "aot_unpaired", "alpha_dpo", "relative_po", "relative_po_diagonal", "bco", "offline_ppo"}


def test_the_table_of_losses() -> None:
    assert {name: set(loss.needs) for name, loss in LOSSES.items()} == {name: NEEDED.get(name, REFERENCE) for name in LOSSES}
    assert {name: loss.unit for name, loss in LOSSES.items()} == {name: UNITS.get(name, "pair") for name in LOSSES}
    assert {name for name, loss in LOSSES.items() if loss.coupled} == COUPLED
    assert set(FIELDS) == set(NEEDS)
    assert {loss.__module__ for loss in LOSSES.values()} == {family.__name__ for family in FAMILIES}


@pytest.mark.parametrize("name", [name for name, (_, auxiliary) in OBJECTIVES.items() if not auxiliary])
def test_needs_are_what_is_used(name: str) -> None:
    """Nothing that is not declared is touched, and what is missing is named."""
    i, objective = interpreter("numpy"), build(*OBJECTIVES[name])
    given = scores(i, fitted(name, CASES["random"]), objective=objective)
    used = {field for need in objective.needs for field in FIELDS[need]}
    used -= {"ref_token_logp"} if "tokens" not in objective.needs else set()
    optional = {field for fields in FIELDS.values() for field in fields}
    least = replace(given, **dict.fromkeys(optional - used), columns={k: given.columns[k] for k in objective.columns})
    assert objective(i.ops, least)["loss"] == objective(i.ops, given)["loss"]
    losses = {term.loss.name for term in objective.preference}
    for need in objective.needs:
        if any((loss, need) in INDIRECT for loss in losses):
            continue
        with pytest.raises(ValueError, match="the objective needs (" + "|".join(FIELDS[need]) + "), but the scores have none"):
            objective(i.ops, replace(given, **dict.fromkeys(FIELDS[need])))
    for column in objective.columns:
        with pytest.raises(ValueError, match=f'needs the column "{column}"'):
            objective(i.ops, replace(given, columns={k: v for k, v in given.columns.items() if k != column}))


# --- Metrics and running statistics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_implicit_rewards(name: str) -> None:
    """What `accuracy` and `margin` are made of: one number per completion."""
    case = CASES["random"]
    for variant in VARIANTS[name]:
        found = build_loss(name, **variant).implicit_reward(raw_scores(case))
        np.testing.assert_allclose(found, implicit_reward({"loss": name, **variant}, case), rtol=1e-14)


def test_a_step_without_pairs_leaves_the_statistics() -> None:
    """No NaN from the mean of nothing."""
    loss = build_loss("alpha_dpo")
    before = dict.fromkeys(loss.initial_state(), 0.5)
    assert loss.advance(replace(raw_scores({**CASES["random"], "chosen": [], "rejected": []}), state=before)) == before


def test_alpha_dpo_without_a_spread_yet() -> None:
    """Two steps of one pair each: there is a mean, but no deviation to divide by; the floor keeps the loss finite."""
    i, case = interpreter("numpy"), {**CASES["single"], "state": {"alpha_dpo": {"steps": 1.0}}}
    for form in ("paper", "code"):
        objective = build([{"loss": "alpha_dpo", "form": form}], None)
        assert np.isfinite(objective(i.ops, scores(i, case, objective=objective))["loss"])
