"""The PyTorch learner's optimizer step: independent of micro-batches and ranks, exact under recomputation, safe against bad numbers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from learner_runs import UPO, configure, difference, examples, limit_for, shake, with_reference  # noqa: E402

import upo_torch  # noqa: E402
from upo.adapters import write_adapter  # noqa: E402
from upo.data.batch import Batch, collate  # noqa: E402
from upo.errors import BackendError, ConfigError, ModelError, NonFiniteError, RunError  # noqa: E402
from upo.losses import Objective, Term  # noqa: E402
from upo.losses.base import Loss, Scores  # noqa: E402
from upo.numpy_ops import ops as numpy_ops  # noqa: E402


def make_learner(folder: Path, objective: object = "dpo", **sections: dict):
    return upo_torch.load(configure(folder, objective, device="cpu", **sections))


def gradient(learner, batch: Batch, limit: int = 8192) -> tuple[dict[str, np.ndarray], object]:
    """What the optimizers are given, and the outcome; the weights stay."""
    grads: dict[str, np.ndarray] = {}

    class Recorder:
        def __init__(self, optimizer):
            self.zero_grad, self.clip, self.params = optimizer.zero_grad, optimizer.clip, optimizer.params

        def step(self, lr):
            grads.update({name: p.grad.numpy().copy() for name, p in self.params.items()})

    own = learner.info, learner.optimizer, learner.head_optimizer
    learner.info = replace(learner.info, micro_batch_tokens=limit)
    learner.optimizer, learner.head_optimizer = (optimizer and Recorder(optimizer) for optimizer in own[1:])
    try:
        outcome = learner.step(batch, 1e-3)
    finally:
        learner.info, learner.optimizer, learner.head_optimizer = own
    return grads, outcome


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
        split, outcome = gradient(learner, batch, limit_for(batch, parts, "packed"))
        # float32 sums in another order; a coupled loss hands the rounding of the log-probs on to the coefficients
        assert difference(whole, split) < (5e-6 if name == "coupled" else 2e-6), parts
        np.testing.assert_allclose(outcome.logp, one.logp, rtol=2e-6)
        for field in ("value", "partner_logp"):
            mine, other = getattr(outcome, field), getattr(one, field)
            assert (mine is None) == (other is None)
            if mine is not None:
                np.testing.assert_allclose(mine, other, rtol=2e-5, atol=1e-6)
    assert (one.value is None) == (name not in ("upo", "coupled"))
    assert (one.partner_logp is None) == (name not in ("kto", "upo"))
    again, _ = gradient(learner, batch)
    assert difference(whole, again) == 0  # deterministic on a CPU


def test_two_passes_equal_one_where_both_apply(tiny_llama):
    learner = make_learner(tiny_llama, UPO)
    shake(learner)
    batch = with_reference(learner, examples())
    limit = limit_for(batch, 3, "packed")
    one, _ = gradient(learner, batch, limit)

    @dataclass(frozen=True)
    class Coupled(Objective):
        coupled = True

    learner.objective = Coupled(learner.objective.preference, learner.objective.auxiliary)
    two, _ = gradient(learner, batch, limit)
    assert difference(one, two) < 2e-6


def test_gradient_matches_finite_differences(tiny_llama):
    learner = make_learner(tiny_llama, UPO)
    shake(learner)
    batch = with_reference(learner, examples(3))
    grads, outcome = gradient(learner, batch)
    state = learner.state()
    rng = np.random.default_rng(1)
    direction = {k: rng.standard_normal(a.shape).astype(np.float32) for k, a in state["adapter"].items()}

    def loss(step: float) -> float:
        learner.load_state({**state, "adapter": {k: a + step * direction[k] for k, a in state["adapter"].items()}})
        logp = learner.score(batch).logp.astype(np.float64)  # value and partners are constants for the adapter
        return float(learner.objective(numpy_ops, batch.scores(logp, outcome.value, outcome.partner_logp - batch.partner_ref_logp))["loss"])

    slope = (loss(1e-3) - loss(-1e-3)) / 2e-3
    exact = sum(float((grads[k].astype(np.float64) * d).sum()) for k, d in direction.items())
    assert abs(exact) > 1e-2
    assert slope == pytest.approx(exact, rel=2e-3)  # float32 loss over a step of 1e-3


def test_value_and_actor_keep_to_their_own_parameters(tiny_llama):
    def both(**auxiliary):
        learner = make_learner(tiny_llama, {"auxiliary": {"rewards": [{"scorer": "length"}], **auxiliary}})
        shake(learner)
        grads, _ = gradient(learner, replace(collate(examples()), partners=None))
        return [max(np.abs(g).max() for n, g in grads.items() if (".lora_" in n) == adapter) for adapter in (True, False)]

    adapter, head = both(gamma=0)
    assert adapter == 0 and head > 1e-3
    adapter, head = both(value_coef=0)
    assert adapter > 1 and head == 0
    assert both(gamma=0, value_coef=0) == [0, 0]


def test_recomputation_gives_the_same_gradient(tiny_llama):
    learner = make_learner(tiny_llama, UPO)
    shake(learner)
    batch = with_reference(learner, examples())
    calls: list[int] = []
    learner.model.decoder.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    plain, one = gradient(learner, batch, limit_for(batch, 3, "packed"))
    before = len(calls)
    learner.config = learner.config.model_copy(update={"train": learner.config.train.model_copy(update={"gradient_checkpointing": True})})
    again, two = gradient(learner, batch, limit_for(batch, 3, "packed"))
    assert len(calls) - before == before + 3  # once more for each of the three micro-batches
    assert difference(plain, again) == 0
    np.testing.assert_array_equal(one.logp, two.logp)


def test_non_finite_scores_name_the_rows_and_leave_the_weights(tiny_llama):
    learner = make_learner(tiny_llama, UPO)
    batch = with_reference(learner, examples())
    learner.step(batch, 1e-3)
    before = learner.state()
    bad = batch.partner_ref_logp.copy()
    bad[3] = np.nan  # z0, and with it every gradient
    with pytest.raises(NonFiniteError, match=r"step 1: .*gradient.* t:1, t:2"):
        learner.step(replace(batch, partner_ref_logp=bad), 1e-3)
    _assert_equal(learner.state(), before)
    reward = batch.reward.copy()
    reward[4] = 1e30  # exp(lambda * A) overflows
    with pytest.raises(NonFiniteError, match="gradient that is not finite"):
        learner.step(replace(batch, reward=reward), 1e-3)
    _assert_equal(learner.state(), before)
    poisoned = {**before, "adapter": {k: a.copy() for k, a in before["adapter"].items()}}
    next(iter(poisoned["adapter"].values()))[:] = np.inf
    learner.load_state(poisoned)
    with pytest.raises(NonFiniteError, match="scores that are not finite"):
        learner.step(batch, 1e-3)
    _assert_equal(learner.state(), poisoned)
    learner.load_state(before)
    learner.step(batch, 1e-3)  # it goes on

    one_row = torch.nn.functional.embedding
    spoilt = int(batch.forest.completions[5][0])

    def embedding(ids, *args, **kwargs):
        return torch.where((ids == spoilt)[..., None], torch.nan, one_row(ids, *args, **kwargs))

    rows = {o for o, c in zip(np.array(batch.origins)[batch.forest.owner], batch.forest.completions, strict=True) if spoilt in c[:-1]}
    assert rows == {"t:3"}
    without = replace(batch, partners=None, partner_ref_logp=None)
    learner.objective = make_learner(tiny_llama, "dpo").objective
    with pytest.MonkeyPatch.context() as patch, pytest.raises(NonFiniteError, match=r"not finite, in rows t:3\. No weight was changed"):
        patch.setattr(torch.nn.functional, "embedding", embedding)
        learner.step(without, 1e-3)


def test_clipping_bounds_adapter_and_head_apart(tiny_llama):
    learner = make_learner(tiny_llama, UPO, optimizer={"clip": 0.5})
    shake(learner)
    grads, outcome = gradient(learner, with_reference(learner, examples()))
    squares = {True: 0.0, False: 0.0}
    for name, g in grads.items():
        squares[".lora_" in name] += float((g.astype(np.float64) ** 2).sum())
    assert outcome.grad_norm > 0.6 and squares[True] ** 0.5 == pytest.approx(0.5, rel=1e-5)
    assert squares[False] ** 0.5 == pytest.approx(min(outcome.value_grad_norm, 0.1), rel=1e-4)  # the head has a clip of its own


def test_learning_rates_of_adapter_and_head(tiny_llama):
    learner = make_learner(tiny_llama, UPO)
    batch = with_reference(learner, examples())
    before = learner.state()
    learner.step(batch, 3e-3)
    after = learner.state()
    moved = {s: max(np.abs(after[s][k] - a).max() for k, a in before[s].items()) for s in ("adapter", "value_head")}
    # AdamW's first step is lr in every coordinate that has a gradient
    assert moved == {"adapter": pytest.approx(3e-3, rel=1e-3), "value_head": pytest.approx(1e-4, rel=1e-3)}


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_state_round_trip_is_bitwise(tiny_llama, optimizer):
    first, second = (make_learner(tiny_llama, UPO, train={"seed": seed}, optimizer={"name": optimizer}) for seed in (0, 1))
    batch = with_reference(first, examples())
    first.fit_value(first.prompt_states(batch.forest), batch.forest.owner, batch.reward)
    assert first.state().keys() == second.state().keys() and first.state()["optimizer"].keys() == second.state()["optimizer"].keys()
    for _ in range(2):
        first.step(batch, 1e-2)
    state = first.state()
    second.load_state(state)
    _assert_equal(second.state(), state)
    a, b = first.step(batch, 1e-2), second.step(batch, 1e-2)
    np.testing.assert_array_equal(a.logp, b.logp)
    _assert_equal(first.state(), second.state())
    assert any((a != state["adapter"][k]).any() for k, a in first.state()["adapter"].items())  # `state` is a copy
    name = "base_model.model.model.layers.0.self_attn.k_proj"
    square = "exp_avg_sq" if optimizer == "adamw" else "square_avg"
    assert state["adapter"][f"{name}.lora_A.weight"].shape == (4, 64) and state["adapter"][f"{name}.lora_B.weight"].shape == (32, 4)
    assert state["optimizer"][f"{name}.lora_B.weight.{square}"].shape == (32, 4)
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


def test_value_head_fit(tiny_llama):
    learner = make_learner(tiny_llama, UPO)
    batch = with_reference(learner, examples())
    states = learner.prompt_states(batch.forest)
    start = learner.fit_value(np.zeros_like(states), batch.forest.owner, np.full(16, 0.25, np.float32))
    assert start["value/fit_loss"] == pytest.approx(0, abs=1e-9)
    fitted = learner.fit_value(states, batch.forest.owner, batch.reward)
    residual = batch.reward - batch.reward.mean()
    at_mean = np.mean(np.where(residual < 0, 0.3, 0.7) * residual**2)
    assert 0 < fitted["value/fit_loss"] < 0.8 * at_mean
    np.testing.assert_allclose(learner.score(batch).value, learner.step(batch, 0.0).value, rtol=1e-5)


def test_references(tiny_llama, tmp_path):
    trained = make_learner(tiny_llama, "dpo", adapter={"targets": ["q_proj", "v_proj"]})
    shake(trained)
    write_adapter(tmp_path / "a", trained.state()["adapter"], trained.adapter_config())
    forest = collate(examples(3)).forest
    policy, base = trained.logps(forest), trained.logps(forest, reference=0)
    assert np.abs(policy - base).min() > 1e-2
    np.testing.assert_array_equal(base, make_learner(tiny_llama, "dpo").logps(forest))

    start = make_learner(tiny_llama, "dpo", adapter={"start": str(tmp_path / "a"), "rank": 4, "alpha": 8}, reference="start")
    np.testing.assert_array_equal(start.logps(forest), policy)
    np.testing.assert_array_equal(start.logps(forest, reference=0), policy)
    assert start.info.targets == ("q_proj", "v_proj") and start.adapter_config()["target_modules"] == ["q_proj", "v_proj"]
    assert start.state()["adapter"].keys() == trained.state()["adapter"].keys()
    batch = replace(with_reference(start, examples(3)), partners=None)
    start.step(batch, 1e-2)
    np.testing.assert_array_equal(start.logps(forest, reference=0), policy)
    assert np.abs(start.logps(forest) - policy).min() > 1e-4

    other = make_learner(tiny_llama, "dpo", adapter={"targets": ["down_proj"]}, reference=str(tmp_path / "a"))
    trainable = {name for name, p in other.model.net.named_parameters() if p.requires_grad}
    assert len(trainable) == 4 and all("down_proj" in name for name in trainable)
    np.testing.assert_array_equal(other.logps(forest, reference=0), policy)
    np.testing.assert_array_equal(other.logps(forest), base)  # B = 0, and the reference's layers are plain again
    assert other.info.targets == ("down_proj",)
    with pytest.raises(RuntimeError), other.model.reference(0):
        raise RuntimeError
    np.testing.assert_array_equal(other.logps(forest), base)
    assert {name for name, p in other.model.net.named_parameters() if p.requires_grad} == trainable

    with pytest.raises(ModelError, match=r"adapter.rank: differs .* rank 4"):
        make_learner(tiny_llama, "dpo", adapter={"start": str(tmp_path / "a"), "rank": 8})
    with pytest.raises(ModelError, match="targets"):
        make_learner(tiny_llama, "dpo", adapter={"start": str(tmp_path / "a"), "targets": ["o_proj"]})
    with pytest.raises((ConfigError, ModelError)):
        make_learner(tiny_llama, "dpo", reference="start")


def test_an_adapter_of_another_model_is_refused(tiny_llama, tmp_path):
    learner = make_learner(tiny_llama, "dpo", adapter={"targets": ["q_proj"]})
    arrays = learner.state()["adapter"]
    moved = {k.replace("layers.1", "layers.7"): a for k, a in arrays.items()}
    write_adapter(tmp_path / "more", moved, learner.adapter_config())
    with pytest.raises(ModelError, match=r"reference: the adapter has weights for model.layers.7.self_attn.q_proj, which this model does not have"):
        make_learner(tiny_llama, "dpo", reference=str(tmp_path / "more"))
    wide = {k: np.concatenate([a, a], 1) if "lora_A" in k else a for k, a in arrays.items()}
    write_adapter(tmp_path / "wide", wide, learner.adapter_config())
    with pytest.raises(ModelError, match=r"adapter.start: .*q_proj is for a layer of \(128, 64\) \(in, out\); this model's is \(64, 64\)"):
        make_learner(tiny_llama, "dpo", adapter={"start": str(tmp_path / "wide")})


@pytest.mark.slow
def test_two_processes_equal_one(tiny_llama, tmp_path):
    """Over gloo, as torchrun starts them."""

    def start(rank: int, size: int, port: int) -> subprocess.Popen[str]:
        ranks = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in ranks.items()}}
        command = [sys.executable, __file__, str(tiny_llama), str(tmp_path / f"{size}.npz")]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for process in [start(0, 1, port), *(start(rank, 2, port) for rank in range(2))]:
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output[-2000:]
    one, two = (np.load(tmp_path / f"{size}.npz") for size in (1, 2))
    assert int(one["size"]) == 1 and int(two["size"]) == 2
    for name in set(one.files) - {"size"}:
        # Scores to 1e-5. Where a gradient is nearly zero, AdamW divides one rounding error by another: for weights, 1e-4 of the largest.
        tolerance = 1e-4 if "lora" in name else 1e-5
        np.testing.assert_allclose(two[name], one[name], rtol=0, atol=tolerance * np.abs(one[name]).max(), err_msg=name)
    assert np.abs(one["logp"][9] - one["logp"][0]).max() > 0.1


@pytest.mark.parametrize(
    ("option", "reason"),
    [("memory_limit_gb", "no limit on cpu.*micro_batch_tokens"), ("cache_limit_gb", "is MLX's.*PYTORCH_CUDA_ALLOC_CONF"), ("wired_limit_gb", "is MLX's")],
)
def test_memory_limits_that_pytorch_lacks_are_refused(tiny_llama, option, reason):
    with pytest.raises(BackendError, match=f"train.{option}: .*{reason}"):
        make_learner(tiny_llama, train={option: 1})


def _ten_steps(folder: str, out: str) -> None:
    learner = make_learner(Path(folder), UPO, train={"micro_batch_tokens": 60}, optimizer={"clip": 1.0})
    batch = with_reference(learner, examples(7))
    outcomes = [learner.step(replace(batch, step=i), 1e-3) for i in range(10)]
    one_row = with_reference(learner, examples(1, seed=9))  # the second rank has none
    last = learner.step(one_row, 1e-3)
    columns = {k: np.array([getattr(o, k) for o in outcomes]) for k in ("logp", "value", "partner_logp", "grad_norm", "value_grad_norm")}
    if learner.comm.rank == 0:
        np.savez(out, size=learner.comm.size, last=last.logp, **columns, **learner.state()["adapter"])


if __name__ == "__main__":
    _ten_steps(*sys.argv[1:])


def test_denormal_numbers_are_zero_during_a_step_alone(tiny_llama, monkeypatch):
    """Attention's backward pass stumbles over them; what the process does besides is not ours to change. A state that was on stays on."""
    small = torch.tensor([1e-40])

    def flushed() -> bool:
        return (small * 1.0).item() == 0.0

    if flushed() or not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such state, or is in it already")
    torch.set_flush_denormal(False)
    learner, seen = make_learner(tiny_llama), []
    batch = with_reference(learner, examples(2))
    inner = learner._backward
    monkeypatch.setattr(learner, "_backward", lambda *args: seen.append(flushed()) or inner(*args))
    learner.step(batch, 1e-3)
    assert seen == [True] and not flushed()
    with pytest.raises(TypeError):
        learner.step(batch)
    assert not flushed()
    torch.set_flush_denormal(True)
    try:
        learner.step(batch, 1e-3)
        assert flushed()
    finally:
        torch.set_flush_denormal(False)
