"""The loss specification in NumPy: golden values, options, documentation."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from interpreters import interpreter
from loss_cases import build, scores
from oracle import step as oracle

from upo.losses import LOSSES, Auxiliary, build_loss, loss_options

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "losses.json").read_text())
GOLDEN_CASES = {case["name"]: case for case in GOLDEN["cases"]}


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_golden(name: str) -> None:
    """The recorded numbers are the oracle's to the last digit, what others published to 8 decimals, and what NumPy computes."""
    case = GOLDEN_CASES[name]
    again = oracle.objective(GOLDEN["step"], case["terms"], case["auxiliary"])
    assert again == case["expected"]
    for term, value in case["published"].items():
        assert round(case["expected"][term], 8) == value
    i = interpreter("numpy")
    found = build(case["terms"], case["auxiliary"])(i.ops, scores(i, GOLDEN["step"]))
    for term, value in found.items():
        assert value == pytest.approx(case["expected"][term.removeprefix("loss/")], rel=1e-14, abs=1e-16)


def test_the_oracle_is_independent() -> None:
    for file in (Path(__file__).parent.parent / "oracle").glob("*.py"):
        names = [n for node in ast.walk(ast.parse(file.read_text())) for n in imported(node)]
        assert {name.partition(".")[0] for name in names} <= {"__future__", "collections", "typing", "mpmath", "oracle"}, file


def imported(node: ast.AST) -> list[str]:
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] if isinstance(node, ast.Import) else []


def test_golden_covers_every_loss() -> None:
    assert {term["loss"] for case in GOLDEN_CASES.values() for term in case["terms"]} == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_documents_itself(name: str) -> None:
    """`upo losses NAME` prints the docstring: it holds the formula and explains every option; the source names a paper."""
    loss = LOSSES[name]
    text = loss.__doc__ or ""
    assert "L(y) =" in text or "L = " in text
    assert [option for option in loss_options(loss) if option not in text] == []
    assert loss.name == name and loss.source and loss.unit and loss.data


def test_needs() -> None:
    assert {name: set(loss.needs) for name, loss in LOSSES.items()} == {"dpo": {"reference"}, "kto": {"reference", "partners"}, "sft": set()}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dqo", {}, 'unknown loss "dqo". Did you mean "dpo"?'),
        ("dpo", {"bet": 0.1}, 'dpo has no option "bet". Did you mean "beta"?'),
        ("dpo", {"beta": "strong"}, "dpo: beta must be a number (got 'strong')"),
        ("dpo", {"beta": True}, "dpo: beta must be a number (got True)"),
        ("dpo", {"beta": 0}, "dpo: beta must be above 0 and finite (got 0.0)"),
        ("dpo", {"beta": float("nan")}, "dpo: beta must be above 0 and finite (got nan)"),
        ("dpo", {"beta": float("inf")}, "dpo: beta must be above 0 and finite (got inf)"),
        ("dpo", {"label_smoothing": 0.5}, "dpo: label_smoothing must be in [0, 0.5) (got 0.5)"),
        ("kto", {"beta": -1}, "kto: beta must be above 0 and finite (got -1.0)"),
        ("kto", {"desirable_weight": -1}, "kto: desirable_weight and undesirable_weight must be finite"),
        ("kto", {"desirable_weight": 0, "undesirable_weight": 0}, "not both 0"),
        ("kto", {"undesirable_weight": float("nan")}, "must be finite"),
        ("sft", {"beta": 0.1}, 'sft has no option "beta"'),
    ],
)
def test_bad_options(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        build_loss(name, **options)
    assert message in str(error.value)


@pytest.mark.parametrize(("name", "field"), [("dpo", "ref_logp"), ("kto", "ref_logp"), ("kto", "partner_logratio")])
def test_missing_scores_are_named(name: str, field: str) -> None:
    i = interpreter("numpy")
    with pytest.raises(ValueError, match=f"needs {field}"):
        build([{"loss": name}], None)(i.ops, replace(scores(i, GOLDEN["step"]), **{field: None}))


def test_yaml_text_is_a_number() -> None:
    assert build_loss("dpo", beta="1e-1").beta == 0.1


@pytest.mark.parametrize("options", [{"gamma": -1.0}, {"temperature": float("inf")}, {"value_coef": float("nan")}, {"expectile": 1.0}, {"expectile": 0.0}])
def test_bad_auxiliary_options(options: dict) -> None:
    with pytest.raises(ValueError, match=f"auxiliary: {next(iter(options))} must be"):
        Auxiliary(**options)


def test_implicit_rewards() -> None:
    """What `accuracy` and `margin` are made of: the scaled log-ratio, or for SFT the log-prob of a token."""
    i = interpreter("numpy")
    given = scores(i, GOLDEN["step"])
    expected = 0.3 * (np.array(GOLDEN["step"]["logp"]) - GOLDEN["step"]["ref_logp"])
    np.testing.assert_allclose(build_loss("dpo", beta=0.3).implicit_reward(given), expected, rtol=1e-15)
    np.testing.assert_allclose(build_loss("kto", beta=0.3).implicit_reward(given), expected, rtol=1e-15)
    np.testing.assert_allclose(build_loss("sft").implicit_reward(given), np.divide(GOLDEN["step"]["logp"], GOLDEN["step"]["length"]), rtol=1e-15)
