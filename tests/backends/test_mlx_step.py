"""The MLX learner's optimizer step: independent of micro-batches and ranks, exact under recomputation, safe against bad numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

from learner_runs import UPO, difference, examples, limit_for, shake, with_reference  # noqa: E402
from mlx_runs import gradient, make_learner  # noqa: E402

from upo.data.batch import collate  # noqa: E402
from upo.errors import BackendError, ConfigError, ModelError, NonFiniteError, RunError  # noqa: E402
from upo.losses import Objective, Term  # noqa: E402
from upo.losses.base import Loss, Scores  # noqa: E402
from upo_mlx import device, exp  # noqa: E402


@dataclass(frozen=True)
class Sorted(Loss):
    """Coupled: chosen and rejected log-ratios are matched by rank over the whole step (as AOT does)."""

    name = "sorted"
    unit = "pair"
    data = "pairs"
    needs = frozenset({"reference"})
    coupled = True
    source = "for the test"

    def __call__(self, ops, scores: Scores):
        chosen, rejected = (ops.take(scores.logratio(), i) for i in (scores.chosen, scores.rejected))
        gap = ops.take(chosen, ops.argsort_stable(chosen)) - ops.take(rejected, ops.argsort_stable(rejected))
        return -ops.log_sigmoid(0.1 * gap)

    def implicit_reward(self, scores: Scores):
        return scores.logratio()


@pytest.mark.parametrize("name", ["dpo", "kto", "upo", "coupled"])
def test_micro_batches_do_not_change_the_gradient(tiny_llama, name):
    learner = make_learner(tiny_llama, UPO if name in ("upo", "coupled") else name)
    if name == "coupled":
        learner.objective = Objective((Term(Sorted()),), learner.objective.auxiliary)
    shake(learner)
    rows = with_reference(learner, examples())
    batch = rows if name in ("kto", "upo") else replace(rows, partners=None, partner_ref_logp=None)
    whole, one = gradient(learner, batch)
    assert max(np.abs(g).max() for g in whole.values()) > 1e-3
    for parts in (3, 8):
        split, outcome = gradient(learner, batch, limit_for(batch, parts, "two_phase"))
        assert difference(whole, split) < 5e-6, parts  # float32 sums in another order
        np.testing.assert_allclose(outcome.logp, one.logp, rtol=2e-6)
        for field in ("value", "partner_logp"):
            mine, other = getattr(outcome, field), getattr(one, field)
            assert (mine is None) == (other is None)
            if mine is not None:
                np.testing.assert_allclose(mine, other, rtol=2e-5, atol=1e-6)
    assert (one.value is None) == (name not in ("upo", "coupled"))
    assert (one.partner_logp is None) == (name not in ("kto", "upo"))


def test_two_passes_equal_one_where_both_apply(tiny_llama):
    learner = make_learner(tiny_llama, UPO)
    shake(learner)
    batch = with_reference(learner, examples())
    limit = limit_for(batch, 3, "two_phase")
    one, _ = gradient(learner, batch, limit)

    @dataclass(frozen=True)
    class Coupled(Objective):
        coupled = True

    learner.objective = Coupled(learner.objective.preference, learner.objective.auxiliary)
    two, _ = gradient(learner, batch, limit)
    assert difference(one, two) < 5e-6


def test_gradient_matches_finite_differences(tiny_llama):
    learner = make_learner(tiny_llama, UPO)
    shake(learner)
    batch = with_reference(learner, examples(3))
    grads, _ = gradient(learner, batch)
    state = learner.state()
    rng = np.random.default_rng(1)
    direction = {k: rng.standard_normal(a.shape).astype(np.float32) for k, a in state["adapter"].items()}

    def loss(step: float) -> float:
        moved = {k: a + step * direction[k] for k, a in state["adapter"].items()}
        learner.load_state({**state, "adapter": moved})
        outcome = learner.score(batch)
        scores = batch.scores(outcome.logp.astype(np.float64), base.value, base.partner_logp - batch.partner_ref_logp)
        return float(learner.objective(NumpyOps(), scores)["loss"])

    base = learner.score(batch)  # value and partners are constants for the adapter
    slope = (loss(1e-3) - loss(-1e-3)) / 2e-3
    exact = sum(float((_peft(k, grads[k]).astype(np.float64) * d).sum()) for k, d in direction.items())
    assert abs(exact) > 1e-2
    assert slope == pytest.approx(exact, rel=2e-3)  # float32 loss over a step of 1e-3


def _peft(name: str, array: np.ndarray) -> np.ndarray:
    return array.T if ".lora_" in name else array


class NumpyOps:
    """The few functions KTO and the auxiliary term call."""

    exp, where, sum = staticmethod(np.exp), staticmethod(np.where), staticmethod(np.sum)

    def sigmoid(self, x):
        return 1 / (1 + np.exp(-x))

    def relu(self, x):
        return np.maximum(x, 0)

    def stop_gradient(self, x):
        return x


@pytest.mark.parametrize("recompute", [False, True])
def test_exponentials_of_products_and_sums_change_nothing(tiny_llama, monkeypatch, recompute):
    learner = make_learner(tiny_llama, train={"gradient_checkpointing": recompute})
    shake(learner)
    batch = with_reference(learner, examples(4))
    used: list[int] = []
    ours = exp.silu
    monkeypatch.setattr(exp, "silu", lambda x: used.append(x.size) or ours(x))
    found = []
    for slow in (True, False):
        monkeypatch.setattr(exp, "slow", lambda slow=slow: slow)
        found.append((learner.logps(batch.forest), learner.prompt_states(batch.forest), gradient(learner, batch)[0], len(used)))
    (quick, states, slopes, calls), (own, own_states, own_slopes, calls_after) = found
    assert calls == calls_after > 0
    np.testing.assert_allclose(quick, own, atol=2e-5)  # sums of some ten tokens, each to 2e-6
    np.testing.assert_allclose(states, own_states, atol=2e-5)
    assert difference(slopes, own_slopes) < 1e-5


def test_recomputation_gives_the_same_gradient_and_leaves_no_trace(tiny_llama):
    learner = make_learner(tiny_llama, UPO)
    shake(learner)
    batch = with_reference(learner, examples())
    layers, kind = list(learner.model.net.layers), type(learner.model.net.layers[0]).__call__
    plain, one = gradient(learner, batch, limit_for(batch, 3, "two_phase"))
    learner.config = learner.config.model_copy(update={"train": learner.config.train.model_copy(update={"gradient_checkpointing": True})})
    again, two = gradient(learner, batch, limit_for(batch, 3, "two_phase"))
    assert difference(plain, again) == 0
    np.testing.assert_array_equal(one.logp, two.logp)
    assert list(learner.model.net.layers) == layers and type(layers[0]).__call__ is kind


def test_recomputation_is_chosen_where_the_model_is_loaded(tiny_llama, monkeypatch):
    found = []
    for free in (10**8, 10**11):
        monkeypatch.setattr(device, "free_memory", lambda *_, free=free: free)
        learner = make_learner(tiny_llama, UPO)
        (note,) = [note for note in learner.info.notes if "gradient_checkpointing" in note]
        found.append((learner.config.train.gradient_checkpointing, note.partition(" (")[0]))
    assert found == [(True, "train.gradient_checkpointing: on"), (False, "train.gradient_checkpointing: off")]


def test_non_finite_scores_name_the_rows_and_leave_the_weights(tiny_llama):
    learner = make_learner(tiny_llama, UPO)
    batch = with_reference(learner, examples())
    learner.step(batch, 1e-3)
    before = learner.state()
    bad = batch.partner_ref_logp.copy()
    bad[3] = np.nan  # z0, and with it every gradient
    with pytest.raises(NonFiniteError, match=r"step 1: .*gradient.* t:1, t:2"):
        learner.step(replace(batch, partner_ref_logp=bad), 1e-3)
    poisoned = {**before, "adapter": {k: a.copy() for k, a in before["adapter"].items()}}
    next(iter(poisoned["adapter"].values()))[:] = np.inf
    learner.load_state(poisoned)
    with pytest.raises(NonFiniteError, match="scores that are not finite"):
        learner.step(batch, 1e-3)
    _assert_equal(learner.state(), poisoned)
    learner.load_state(before)
    reward = batch.reward.copy()
    reward[4] = 1e30  # exp(lambda * A) overflows
    with pytest.raises(NonFiniteError, match="gradient that is not finite"):
        learner.step(replace(batch, reward=reward), 1e-3)
    _assert_equal(learner.state(), before)


def test_clipping_bounds_the_adapter_alone(tiny_llama):
    learner = make_learner(tiny_llama, UPO, optimizer={"clip": 0.5})
    shake(learner)
    batch = with_reference(learner, examples())
    grads, outcome = gradient(learner, batch)
    squares = {True: 0.0, False: 0.0}
    for name, g in grads.items():
        squares[".lora_" in name] += float((g.astype(np.float64) ** 2).sum())
    assert outcome.grad_norm > 0.6 and squares[True] ** 0.5 == pytest.approx(0.5, rel=1e-5)
    expected = min(outcome.value_grad_norm, 0.1)  # the head has a clip of its own
    assert squares[False] ** 0.5 == pytest.approx(expected, rel=1e-4)


def test_the_head_has_a_learning_rate_of_its_own(tiny_llama):
    learner = make_learner(tiny_llama, UPO)
    shake(learner)
    batch = with_reference(learner, examples())
    before = learner.state()
    learner.step(batch, 1e-2)
    after = learner.state()
    moved = {k: max(np.abs(after[k][n] - a).max() for n, a in before[k].items()) for k in ("adapter", "value_head")}
    assert moved == {"adapter": pytest.approx(1e-2, rel=1e-3), "value_head": pytest.approx(1e-4, rel=1e-2)}  # AdamW's first step is lr


def test_state_round_trip_is_bitwise(tiny_llama):
    first, second = (make_learner(tiny_llama, UPO, train={"seed": seed}) for seed in (0, 1))
    batch = with_reference(first, examples())
    first.fit_value(first.prompt_states(batch.forest), batch.forest.owner, batch.reward)
    for _ in range(2):
        first.step(batch, 1e-2)
    state = first.state()
    second.load_state(state)
    _assert_equal(second.state(), state)
    a, b = first.step(batch, 1e-2), second.step(batch, 1e-2)
    np.testing.assert_array_equal(a.logp, b.logp)
    _assert_equal(first.state(), second.state())
    name = "base_model.model.model.layers.0.self_attn.k_proj"
    assert state["adapter"][f"{name}.lora_A.weight"].shape == (4, 64) and state["adapter"][f"{name}.lora_B.weight"].shape == (32, 4)
    assert state["optimizer"][f"{name}.lora_B.weight.exp_avg_sq"].shape == (32, 4)
    assert state["optimizer"][f"{name}.lora_B.weight.step"] == 2 and state["optimizer"]["value_head.4.bias.step"] == 2
    assert state["value_head"]["0.weight"].shape == (64, 64)
    with pytest.raises(RunError, match=r"adapter lacks .*lora_A"):
        second.load_state({**state, "adapter": {}})
    with pytest.raises(RunError, match="value_head has more"):
        second.load_state({**state, "value_head": {**state["value_head"], "more": np.zeros(1)}})
    with pytest.raises(RunError, match=r"4.bias has shape \[2\]"):
        second.load_state({**state, "value_head": {**state["value_head"], "4.bias": np.zeros(2)}})


def _assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for section in a:
        assert a[section].keys() == b[section].keys()
        for name, array in a[section].items():
            np.testing.assert_array_equal(array, b[section][name], err_msg=f"{section} {name}", strict=True)


def test_value_head_fit_and_prompt_states(tiny_llama):
    learner = make_learner(tiny_llama, UPO)
    batch = with_reference(learner, examples())
    states = learner.prompt_states(batch.forest)
    alone = np.array(learner.model.net.model(mx.array(batch.forest.prompts[2])[None])[0, -1])
    np.testing.assert_allclose(states[2], alone, atol=2e-6)
    start = learner.fit_value(np.zeros_like(states), batch.forest.owner, np.full(16, 0.25, np.float32))
    assert start["value/fit_loss"] == pytest.approx(0, abs=1e-9)
    fitted = learner.fit_value(states, batch.forest.owner, batch.reward)
    residual = batch.reward - batch.reward.mean()
    at_mean = np.mean(np.where(residual < 0, 0.3, 0.7) * residual**2)
    assert 0 < fitted["value/fit_loss"] < 0.8 * at_mean
    np.testing.assert_allclose(learner.score(batch).value, learner.step(batch, 0.0).value, rtol=1e-5)


def test_references(tiny_llama, tmp_path):
    from upo.adapters import write_adapter

    trained = make_learner(tiny_llama, "dpo", adapter={"targets": ["q_proj", "v_proj"]})
    shake(trained)
    write_adapter(tmp_path / "a", trained.state()["adapter"], trained.adapter_config())
    forest = collate(examples(3)).forest
    policy, base = trained.logps(forest), trained.logps(forest, reference=0)
    assert np.abs(policy - base).min() > 1e-2

    start = make_learner(tiny_llama, "dpo", adapter={"start": str(tmp_path / "a"), "rank": 4, "alpha": 8}, reference="start")
    np.testing.assert_array_equal(start.logps(forest), policy)
    np.testing.assert_array_equal(start.logps(forest, reference=0), policy)
    assert start.info.targets == ("q_proj", "v_proj") and start.adapter_config()["target_modules"] == ["q_proj", "v_proj"]
    batch = replace(with_reference(start, examples(3)), partners=None)
    start.step(batch, 1e-2)
    np.testing.assert_array_equal(start.logps(forest, reference=0), policy)
    assert np.abs(start.logps(forest) - policy).min() > 1e-4

    other = make_learner(tiny_llama, "dpo", adapter={"targets": ["down_proj"]}, reference=str(tmp_path / "a"))
    np.testing.assert_array_equal(other.logps(forest, reference=0), policy)
    np.testing.assert_array_equal(other.logps(forest), base)  # B = 0, and the reference's layers are plain again
    assert other.info.targets == ("down_proj",)
    with pytest.raises(RuntimeError), other.model.using(other.references[0]):
        raise RuntimeError
    assert all(layer.lora_a is None for layer in other.model.loras.values())
    np.testing.assert_array_equal(other.logps(forest), base)

    with pytest.raises(ModelError, match=r"adapter.rank: differs .* rank 4"):
        make_learner(tiny_llama, "dpo", adapter={"start": str(tmp_path / "a"), "rank": 8})
    with pytest.raises(ModelError, match="targets"):
        make_learner(tiny_llama, "dpo", adapter={"start": str(tmp_path / "a"), "targets": ["o_proj"]})
    with pytest.raises((ConfigError, ModelError)):
        make_learner(tiny_llama, "dpo", reference="start")


@pytest.mark.slow
def test_two_processes_equal_one(tiny_llama, tmp_path):
    command = [sys.executable, __file__, str(tiny_llama)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    launch = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--backend", "ring", "--"]
    for name, prefix in (("one", []), ("two", launch)):
        done = subprocess.run([*prefix, *command, str(tmp_path / f"{name}.npz")], env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert int(one["size"]) == 1 and int(two["size"]) == 2
    for name in set(one.files) - {"size"}:
        # Scores to 1e-5. Where a gradient is nearly zero, AdamW divides one rounding error by another: for weights, 1e-4 of the largest.
        tolerance = 1e-4 if "lora" in name else 1e-5
        np.testing.assert_allclose(two[name], one[name], rtol=0, atol=tolerance * np.abs(one[name]).max(), err_msg=name)
    assert np.abs(one["logp"][9] - one["logp"][0]).max() > 0.1


def test_memory_limits(tiny_llama):
    """Set as configured; the wired one, which MLX would take and not use on a CPU, is refused."""
    before = mx.set_memory_limit(10**9), mx.set_cache_limit(10**9)
    try:
        make_learner(tiny_llama, "dpo", device="cpu")
        assert (mx.set_memory_limit(10**9), mx.set_cache_limit(10**9)) == (10**9, 10**9)
        make_learner(tiny_llama, "dpo", device="cpu", train={"memory_limit_gb": 1.5, "cache_limit_gb": 0.25})
        assert (mx.set_memory_limit(10**9), mx.set_cache_limit(10**9)) == (1_500_000_000, 250_000_000)
        with pytest.raises(BackendError, match=r"train.wired_limit_gb: .* on Metal only.*train.memory_limit_gb"):
            make_learner(tiny_llama, "dpo", device="cpu", train={"wired_limit_gb": 1})
    finally:
        mx.set_memory_limit(before[0]), mx.set_cache_limit(before[1])


def _ten_steps(folder: str, out: str) -> None:
    learner = make_learner(Path(folder), UPO, train={"micro_batch_tokens": 60}, optimizer={"clip": 1.0})
    batch = with_reference(learner, examples(7))
    outcomes = [learner.step(replace(batch, step=i), 1e-3) for i in range(10)]
    columns = {k: np.array([getattr(o, k) for o in outcomes]) for k in ("logp", "value", "partner_logp", "grad_norm", "value_grad_norm")}
    if learner.comm.rank == 0:
        np.savez(out, size=learner.comm.size, **columns, **learner.state()["adapter"])


if __name__ == "__main__":
    _ten_steps(*sys.argv[1:])
