"""The PyTorch backend's numerics against NumPy in float64: token log-probs, optimizers, value head, clipping."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from upo_torch import logps, value  # noqa: E402
from upo_torch.model import Head  # noqa: E402
from upo_torch.state import Optimizer  # noqa: E402


def linear(weight: np.ndarray, bias: np.ndarray | None = None) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        if bias is not None:
            layer.bias.copy_(torch.from_numpy(bias))
    return layer.requires_grad_(False)


@pytest.mark.parametrize("vocab", [64, 37])
@pytest.mark.parametrize("bias, scale, cap", [(False, 1.0, None), (True, 1.0, None), (False, 0.25, None), (True, 2.0, 5.0)])
def test_token_logps_value_and_gradient(vocab, bias, scale, cap, monkeypatch):
    monkeypatch.setattr(logps, "CHUNK_ELEMENTS", 1)  # the least rows at a time: 40 tokens make two chunks and a rest
    rng = np.random.default_rng(0)
    weight, shift, hidden = rng.standard_normal((vocab, 24)), rng.standard_normal(vocab) * bias, 1.5 * rng.standard_normal((40, 24))
    targets, factor = rng.integers(0, vocab, 40), rng.standard_normal(40)

    z = scale * (hidden @ weight.T + shift)
    inner = np.ones_like(z) if cap is None else 1 - np.tanh(z / cap) ** 2
    z = z if cap is None else cap * np.tanh(z / cap)
    log_softmax = z - z.max(-1, keepdims=True)
    log_softmax -= np.log(np.exp(log_softmax).sum(-1, keepdims=True))
    residual = (np.eye(vocab)[targets] - np.exp(log_softmax)) * factor[:, None]
    expected, slope = log_softmax[np.arange(40), targets], scale * (residual * inner) @ weight

    head = Head(linear(weight, shift if bias else None), vocab, scale, cap)
    h, t, f = torch.tensor(hidden, dtype=torch.float32, requires_grad=True), torch.from_numpy(targets), torch.tensor(factor, dtype=torch.float32)
    got = logps.token_logps(head, vocab, h, t)
    (f * got).sum().backward()
    np.testing.assert_allclose(got.detach(), expected, atol=2e-5)
    np.testing.assert_allclose(h.grad, slope, atol=3e-5)
    with torch.no_grad():
        np.testing.assert_allclose(logps.token_logps(head, vocab, h, t), expected, atol=2e-5)


def test_frozen_head_equals_the_plain_head():
    rng = np.random.default_rng(1)
    head = Head(linear(rng.standard_normal((300, 32))), 300)
    hidden, targets = torch.tensor(rng.standard_normal((50, 32)), dtype=torch.float32), torch.from_numpy(rng.integers(0, 300, 50))
    grads, factor = [], torch.tensor(rng.standard_normal(50), dtype=torch.float32)
    for score in (lambda h: logps.token_logps(head, 300, h, targets), lambda h: torch.log_softmax(head(h), -1)[torch.arange(50), targets]):
        h = hidden.clone().requires_grad_()
        torch.tanh(factor * score(h)).sum().backward()  # a loss that is not linear in the log-probs
        grads.append(h.grad)
    assert grads[1].abs().max() > 0.1
    np.testing.assert_allclose(grads[0], grads[1], atol=1e-6)


def test_sum_over_a_large_vocabulary_is_not_biased():
    rng = np.random.default_rng(0)
    weight, hidden = rng.standard_normal((49152, 8)), rng.standard_normal((4, 8))
    z = hidden @ weight.T
    exact = z[:, 7] - np.log(np.exp(z).sum(-1))
    with torch.no_grad():
        ours = logps.token_logps(Head(linear(weight), 49152), 49152, torch.tensor(hidden, dtype=torch.float32), torch.full((4,), 7))
    np.testing.assert_allclose(ours, exact, atol=5e-6)  # a few ulp at 15


def adamw(p, g, m, v, t, lr, decay, eps=1e-8):
    p = p - lr * decay * p
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    return p - lr / (1 - 0.9**t) * m / (np.sqrt(v) / np.sqrt(1 - 0.999**t) + eps), m, v


def rmsprop(p, g, v, lr, decay, eps=1e-8):
    g = g + decay * p
    v = 0.99 * v + 0.01 * g * g
    return p - lr * g / (np.sqrt(v) + eps), v


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["adamw", "rmsprop"])
def test_optimizers_follow_the_formulas(kind, decay):
    rng = np.random.default_rng(0)
    p, m, v = rng.standard_normal((5, 3)), np.zeros((5, 3)), np.zeros((5, 3))
    param = torch.tensor(p, dtype=torch.float32, requires_grad=True)
    optimizer = Optimizer(kind, {"x": param}, weight_decay=decay)
    first = p
    assert optimizer.state()["x.step"] == 0
    for t in range(1, 21):
        g, lr = rng.standard_normal((5, 3)) * 10.0 ** rng.integers(-3, 2), 1e-2 / t
        optimizer.zero_grad()
        param.grad += torch.tensor(g, dtype=torch.float32)
        optimizer.step(lr)
        if kind == "adamw":
            p, m, v = adamw(p, g, m, v, t, lr, decay)
        else:
            p, v = rmsprop(p, g, v, lr, decay)
    assert np.abs(p - first).max() > 0.02
    np.testing.assert_allclose(param.detach(), p, atol=2e-6)  # 20 roundings of numbers near 1
    square = "exp_avg_sq" if kind == "adamw" else "square_avg"
    np.testing.assert_allclose(optimizer.state("h.")[f"h.x.{square}"], v, rtol=1e-5)
    assert optimizer.state()["x.step"] == 20 and optimizer.state()["x.step"].shape == ()


def test_clip_is_global():
    params = {"a": torch.zeros(2, 3, requires_grad=True), "b": torch.zeros(4, requires_grad=True)}
    optimizer = Optimizer("adamw", params)
    total = np.sqrt(6 * 9 + 4)
    for largest, scale in ((2.0, 2 / (total + 1e-6)), (100.0, 1.0)):
        optimizer.zero_grad()
        params["a"].grad += 3
        params["b"].grad -= 1
        assert optimizer.clip(largest) == pytest.approx(total, rel=1e-6)
        np.testing.assert_allclose(params["a"].grad, 3 * scale, rtol=1e-6)
        np.testing.assert_allclose(params["b"].grad, -scale, rtol=1e-6)


CPU = torch.device("cpu")


def test_value_head_forward_and_its_gradients():
    rng = np.random.default_rng(0)
    states = torch.tensor(rng.standard_normal((6, 32)) * 3 + 1, dtype=torch.float32, requires_grad=True)
    head = value.initial_head(32, 0.4, 3, CPU)
    np.testing.assert_allclose(value.value(head, states).detach(), 0.4, atol=1e-7)
    head["4.weight"] = torch.tensor(rng.standard_normal((1, 32)), dtype=torch.float32, requires_grad=True)
    w = {k: a.detach().double().numpy() for k, a in head.items()}
    x = states.detach().double().numpy()
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = np.maximum(x @ w["0.weight"].T + w["0.bias"], 0)
    x = np.maximum(x @ w["2.weight"].T + w["2.bias"], 0)
    out = value.value(head, states)
    np.testing.assert_allclose(out.detach(), (x @ w["4.weight"].T + w["4.bias"])[:, 0], rtol=2e-5, atol=1e-6)
    out.sum().backward()
    assert states.grad is None  # the language model learns nothing from the value loss
    assert all(p.grad.abs().max() > 0 for p in head.values())


def test_fit_reaches_the_expectile():
    states = np.zeros((1, 16), np.float32)  # one prompt: V can only be a number
    reward = np.array([0.0, 1.0], np.float32)
    head = value.initial_head(16, 0.5, 0, CPU)
    loss = value.fit(head, states, np.zeros(2, np.int64), reward, expectile=0.8, steps=400, lr=3e-3)
    # the minimum of the mean of 0.8 (1 - v)^2 and 0.2 v^2
    assert value.value(head, torch.from_numpy(states)).item() == pytest.approx(0.8, abs=0.01)
    assert loss == pytest.approx(0.08, abs=1e-3)
