"""Every loss and objective on every interpreter has the oracle's values, terms, gradients and running statistics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from interpreters import NAMES, close, interpreter
from loss_cases import CASES, expected, fitted, raw_scores, state_before
from loss_objectives import OBJECTIVES, VARIANTS, applies, build
from loss_runs import evaluate, gradients
from oracle import step as oracle
from oracle.inputs import LEAVES

from upo.losses import LOSSES, loss_options
from upo.losses.options import ranges


def test_every_loss_has_an_oracle_and_every_choice_a_case() -> None:
    assert set(oracle.LOSSES) == set(LOSSES) == set(VARIANTS)
    for name, loss in LOSSES.items():
        assert {} in VARIANTS[name], name
        assert {option for variant in VARIANTS[name] for option in variant} == set(loss_options(loss)), name
        for option, words in ranges(loss).items():
            choices = set(words.split(" or ")) if isinstance(loss_options(loss)[option], str) and words else set()
            assert choices <= {variant.get(option, loss_options(loss)[option]) for variant in VARIANTS[name]}, (name, option)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("framework", [*NAMES, "torch64"])
def test_equals_the_oracle(framework: str, name: str) -> None:
    i, objective = interpreter(framework), build(*OBJECTIVES[name])
    for case in CASES:
        if not applies(name, case):
            continue
        given, wanted = fitted(name, CASES[case]), expected(name, case)
        try:
            found = evaluate(i, objective, given)
            terms = ("preference",) * bool(objective.preference) + ("auxiliary", "value") * bool(objective.auxiliary)
            assert set(found) == {"loss", *(f"loss/{term}" for term in terms)}
            for term, value in found.items():
                close(i, "value", value, wanted[term.removeprefix("loss/")], size=wanted["size"])
            if i.differentiates:
                for leaf, slopes in zip(LEAVES, gradients(i, objective, given), strict=True):
                    close(i, "gradient", slopes, wanted["gradient"].get(leaf, np.zeros(len(given[leaf]))))
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from None


STATEFUL = ("bco", "bco-0.3", "alpha_dpo", "alpha_dpo-code-0.6-0.2-0.1-1.5", "two-states")


@pytest.mark.parametrize(("name", "case"), [(name, case) for name in STATEFUL for case in CASES if applies(name, case)])
def test_running_statistics(name: str, case: str) -> None:
    """They start at 0, and one step advances each term's own by the whole step, in float64."""
    terms, _ = OBJECTIVES[name]
    objective, raw = build(terms, None), raw_scores(CASES[case])
    assert set(objective.initial_state().values()) == {0.0}
    found = objective.advance(replace(raw, state=state_before(objective, CASES[case])))
    for place, term in enumerate(terms):
        for key, value in oracle.state(CASES[case], term).items():
            assert found.pop(f"{place}.{term['loss']}.{key}") == pytest.approx(value, rel=1e-13, abs=1e-15), key
    assert not found
