"""What UPO promises beyond its formula: which part trains what, and which changes must not matter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from interpreters import NAMES, Interpreter, close, interpreter
from loss_cases import CASES, exact, scores
from loss_objectives import AUXILIARY, build

from upo.losses import KTO, Auxiliary, Objective, Term
from upo.losses.auxiliary import expectile_loss

DIFFERENTIATING = [name for name in NAMES if name != "numpy"]
RANDOM = CASES["random"]
N = len(RANDOM["logp"])


def gradients(i: Interpreter, objective: Objective, case: dict[str, Any], term: str = "loss") -> list[np.ndarray]:
    """Of one term by logp and by value."""
    given = scores(i, case)
    return i.gradient(lambda logp, value: objective(i.ops, replace(given, logp=logp, value=value))[term], [case["logp"], case["value"]])


@pytest.mark.parametrize("framework", NAMES)
def test_switched_off_it_is_kto(framework: str) -> None:
    """gamma 0 and no value loss: bit for bit, and even where the weights overflow. Likewise without an auxiliary term."""
    i, kto = interpreter(framework), Objective((Term(KTO(beta=0.1)),))
    off = replace(kto, auxiliary=Auxiliary(gamma=0.0, value_coef=0.0))
    for case in (RANDOM, {**RANDOM, "reward": [1e3] * N}):
        assert i.numpy(off(i.ops, scores(i, case))["loss"]) == i.numpy(kto(i.ops, scores(i, case))["loss"])
    if i.differentiates:
        for a, b in zip(gradients(i, off, RANDOM), gradients(i, kto, RANDOM), strict=True):
            np.testing.assert_array_equal(a, b)
    headless = replace(scores(i, RANDOM), value=None, reward=None)
    assert set(kto(i.ops, headless)) == {"loss", "loss/preference"}


@pytest.mark.parametrize("framework", DIFFERENTIATING)
def test_each_term_trains_its_own(framework: str) -> None:
    """The value loss gives the language model no gradient; actor and preference give the value head none."""
    i, objective = interpreter(framework), build([{"loss": "kto"}], AUXILIARY)
    logp, value = gradients(i, objective, RANDOM, "loss/value")
    assert not logp.any() and np.abs(value).min() > 0
    for term in ("loss/auxiliary", "loss/preference"):
        logp, value = gradients(i, objective, RANDOM, term)
        assert np.abs(logp).min() > 0 and not value.any()


@pytest.mark.parametrize("framework", NAMES)
def test_constant_reward_is_likelihood(framework: str) -> None:
    """R = V everywhere: the actor is gamma times the mean token NLL of all completions, chosen and rejected."""
    i, gamma = interpreter(framework), 3.0
    case = {**RANDOM, "reward": exact([0.3] * N), "value": exact([0.3] * N)}
    found = Objective((), Auxiliary(gamma=gamma))(i.ops, scores(i, case))
    expected = -np.mean(np.divide(case["logp"], case["length"]))
    close(i, "value", found["loss/auxiliary"], expected)
    close(i, "value", found["loss"], gamma * expected)
    assert i.numpy(found["loss/value"]) == 0


@pytest.mark.parametrize("framework", NAMES)
def test_temperature_zero_is_likelihood(framework: str) -> None:
    """lambda = 0, the control: rewards do not matter to the actor."""
    i = interpreter(framework)
    found = Objective((), Auxiliary(temperature=0.0))(i.ops, scores(i, RANDOM))["loss/auxiliary"]
    close(i, "value", found, -np.mean(np.divide(RANDOM["logp"], RANDOM["length"])))


@pytest.mark.parametrize("framework", NAMES)
def test_adding_to_reward_and_value_changes_nothing(framework: str) -> None:
    """R + c(x) and V + c(x): only the advantage counts."""
    i, objective = interpreter(framework), build([{"loss": "kto"}], AUXILIARY)
    shift = np.arange(N) % 3 * 0.25 - 0.5
    given = {**RANDOM, "reward": (np.round(np.multiply(RANDOM["reward"], 256)) / 256).tolist(), "value": (np.round(np.multiply(RANDOM["value"], 256)) / 256).tolist()}
    moved = {**given, "reward": (given["reward"] + shift).tolist(), "value": (given["value"] + shift).tolist()}  # exact in float32
    first, second = (objective(i.ops, scores(i, case)) for case in (given, moved))
    for term in first:
        assert i.numpy(first[term]) == i.numpy(second[term]), term
    only_reward = objective(i.ops, scores(i, {**moved, "value": given["value"]}))
    assert abs(i.numpy(only_reward["loss"]) - i.numpy(first["loss"])) > 1e-2


@pytest.mark.parametrize("framework", NAMES)
def test_warm_up_counts_optimizer_steps(framework: str) -> None:
    """The actor is off in steps 0, 1, 2 of a warm-up of 3 and on from step 3; the value loss never waits."""
    i, objective = interpreter(framework), build([{"loss": "kto"}], {**AUXILIARY, "actor_warmup_steps": 3})
    found = [{k: float(i.numpy(v)) for k, v in objective(i.ops, scores(i, {**RANDOM, "step": s})).items()} for s in range(5)]
    assert [f["loss/auxiliary"] != 0 for f in found] == [False, False, False, True, True]
    assert found[3]["loss/auxiliary"] == found[4]["loss/auxiliary"] > 0
    assert len({f["loss/value"] for f in found}) == 1 and found[0]["loss/value"] > 0
    overflow = objective(i.ops, scores(i, {**RANDOM, "reward": [1e3] * N, "step": 0}))
    assert np.isfinite(i.numpy(overflow["loss"]))
    if i.differentiates:
        assert not gradients(i, objective, {**RANDOM, "step": 2}, "loss/auxiliary")[0].any()


@pytest.mark.parametrize("tau", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("framework", DIFFERENTIATING)
def test_value_fits_the_expectile(framework: str, tau: float) -> None:
    """Descending the value loss drives V to the tau-expectile of the rewards: at 0.5 their mean, above it with a larger tau."""
    i = interpreter(framework)
    reward = np.array([0.1, 0.15, 0.2, 0.9])
    value = np.zeros(1)
    for _ in range(300):
        value = value - 0.5 * i.gradient(lambda v: i.ops.sum(expectile_loss(i.ops, i.floats(reward) - v, tau)) / 4, [value])[0]
    excess, lack = np.maximum(reward - value, 0).sum(), np.maximum(value - reward, 0).sum()
    assert tau * excess == pytest.approx((1 - tau) * lack, rel=1e-4)  # what defines the expectile
    assert (value[0] == pytest.approx(reward.mean(), abs=1e-5)) == (tau == 0.5)


def test_larger_rewards_weigh_more() -> None:
    """The weight of a completion is exp(lambda * A): e^5 times as much for one point of reward."""
    i = interpreter("numpy")
    weight = Auxiliary(temperature=5.0).weight(i.ops, scores(i, {**RANDOM, "reward": [0.0, 1.0] * (N // 2), "value": [0.5] * N}))
    assert weight[1] / weight[0] == pytest.approx(np.exp(5), rel=1e-12)


def test_needs_and_weights() -> None:
    objective = build([{"loss": "dpo", "weight": 2.0}, {"loss": "sft", "weight": 0.5}], None)
    assert objective.needs == {"reference"} and not objective.coupled
    assert build([{"loss": "kto"}], AUXILIARY).needs == {"reference", "partners", "rewards", "value"}
    assert build([], AUXILIARY).needs == {"rewards", "value"}
    i = interpreter("numpy")
    parts = [build([{"loss": name}], None)(i.ops, scores(i, RANDOM))["loss"] for name in ("dpo", "sft")]
    assert objective(i.ops, scores(i, RANDOM))["loss"] == pytest.approx(2 * parts[0] + 0.5 * parts[1], rel=1e-14)
