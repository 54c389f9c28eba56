"""The MLX backend's numerics against NumPy in float64: token log-probs, optimizers, value head, clipping."""

from __future__ import annotations

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

import mlx.nn as nn  # noqa: E402

from upo_mlx import exp, logps, value  # noqa: E402
from upo_mlx.state import Optimizer, clip, norm  # noqa: E402


def reference_logps(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    top = logits.max(-1, keepdims=True)
    return logits[np.arange(len(targets)), targets] - (top[:, 0] + np.log(np.exp(logits - top).sum(-1)))


@pytest.mark.parametrize("vocab", [64, 1000, 37])  # whole blocks, blocks and a rest, less than a block
@pytest.mark.parametrize("cap", [None, 5.0])
def test_token_logps_value_and_gradient(vocab, cap, monkeypatch):
    monkeypatch.setattr(logps, "CHUNK_ELEMENTS", 4 * vocab)  # 4 tokens at a time: 11 tokens make two chunks and a rest
    rng = np.random.default_rng(0)
    weight, hidden = rng.standard_normal((vocab, 16)), 2 * rng.standard_normal((11, 16))
    targets, factor = rng.integers(0, vocab, 11), rng.standard_normal(11)

    def logits(h: np.ndarray) -> np.ndarray:
        z = h @ weight.T
        return z if cap is None else cap * np.tanh(z / cap)

    w = mx.array(weight.astype(np.float32))

    def head(h):
        z = h @ w.T
        return z if cap is None else cap * mx.tanh(z / cap)

    h, t, f = mx.array(hidden.astype(np.float32)), mx.array(targets), mx.array(factor.astype(np.float32))
    expected = reference_logps(logits(hidden), targets)
    np.testing.assert_allclose(np.array(logps.token_logps(head, h, t)), expected, atol=2e-5)
    np.testing.assert_allclose(np.array(logps.token_logps_only(head, h, t)), expected, atol=2e-5)

    z = logits(hidden)
    softmax = np.exp(z - z.max(-1, keepdims=True))
    softmax /= softmax.sum(-1, keepdims=True)
    residual = (np.eye(vocab)[targets] - softmax) * factor[:, None]
    slope = residual @ weight if cap is None else (residual * (1 - (z / cap) ** 2)) @ weight
    got = mx.grad(lambda h: mx.sum(f * logps.token_logps(head, 1.0 * h, t)))(h)  # through a graph, as in training
    np.testing.assert_allclose(np.array(got), slope, atol=3e-5)


@pytest.mark.parametrize("slow", [False, True])
def test_sum_over_a_large_vocabulary_is_not_biased(slow, monkeypatch):
    monkeypatch.setattr(exp, "slow", lambda: slow)
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((4, 49152))).astype(np.float32)
    exact = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    whole, softmax = logps._log_partition(mx.array(logits))
    np.testing.assert_allclose(np.array(whole)[:, 0], exact, atol=2e-6)  # two ulp at 15; a flat float32 sum is off by 4e-5 here
    np.testing.assert_allclose(np.array(softmax), np.exp(logits - exact[:, None]), rtol=4e-6)
    odd = mx.array([[0.0, -np.inf, 200.0], [np.nan, 0.0, 1.0], [np.inf, 0.0, 1.0]])
    np.testing.assert_array_equal(np.array(logps._log_partition(odd)[0])[:, 0], np.array([200.0, np.nan, np.nan], np.float32))


def test_exp_of_products_and_sums(monkeypatch):
    monkeypatch.setattr(exp, "slow", lambda: True)
    x = np.concatenate([np.linspace(-87, 87, 50001), np.linspace(-1, 1, 5001), [0.0, 0.5 * np.log(2), -0.5 * np.log(2)]]).astype(np.float32)
    wide = x.astype(np.float64)
    error = np.array(exp.exp(mx.array(x))).astype(np.float64) / np.exp(wide) - 1
    assert (np.abs(error) < 1.2e-7 * (1 + np.abs(wide))).all()  # two roundings, and one of x * log2(e)
    assert float(exp.exp(mx.array(0.0))) == 1.0
    low, lower, high, odd = np.array(exp.exp(mx.array([-87.0, -1e30, 1e30, np.nan])))
    assert 0 < lower <= low < 2e-38 and high > 8e37 and np.isnan(odd)


def test_silu_of_products_and_sums():
    x = np.concatenate([np.linspace(-120, 120, 4001), [0.0, -0.0, 1e-20]]).astype(np.float32)
    wide = x.astype(np.float64)
    sigmoid = 1 / (1 + np.exp(-wide))
    with exp.quick_silu():
        assert nn.silu is (exp.silu if exp.slow() else exp._silu)
        value, gradient = mx.vjp(exp.silu, [mx.array(x)], [3 * mx.ones(x.shape)])
        # MLX's own: 4e-6 at large negative x. Below -87 it is x times 1.2e-38.
        np.testing.assert_allclose(np.array(value[0]), wide * sigmoid, rtol=1.2e-5, atol=2e-36)
        np.testing.assert_allclose(np.array(gradient[0]), 3 * sigmoid * (1 + wide * (1 - sigmoid)), rtol=1.2e-5, atol=1e-6)
        near = np.abs(x) < 12
        np.testing.assert_allclose(np.array(value[0])[near], (wide * sigmoid)[near], rtol=2e-6)
        assert exp.silu(mx.array(x).astype(mx.bfloat16)).dtype == mx.bfloat16
    assert nn.silu is exp._silu


def test_silu_is_put_back_after_an_error():
    with pytest.raises(KeyError), exp.quick_silu():
        raise KeyError
    assert nn.silu is exp._silu


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
def test_optimizers_follow_torch_formulas(kind, decay):
    rng = np.random.default_rng(0)
    p, m, v = rng.standard_normal((5, 3)), np.zeros((5, 3)), np.zeros((5, 3))
    params = {"x": mx.array(p.astype(np.float32))}
    optimizer = Optimizer(kind, params, weight_decay=decay)
    first = p
    for t in range(1, 21):
        g = rng.standard_normal((5, 3)) * 10.0 ** rng.integers(-3, 2)
        params = optimizer.update(params, {"x": mx.array(g.astype(np.float32))}, 1e-2)
        if kind == "adamw":
            p, m, v = adamw(p, g, m, v, t, 1e-2, decay)
        else:
            p, v = rmsprop(p, g, v, 1e-2, decay)
    assert np.abs(p - first).max() > 0.05
    np.testing.assert_allclose(np.array(params["x"]), p, atol=2e-6)  # 20 roundings of numbers near 1
    square = "exp_avg_sq" if kind == "adamw" else "square_avg"
    np.testing.assert_allclose(optimizer.state("h.")[f"h.x.{square}"], v, rtol=1e-5)
    assert optimizer.state()["x.step"] == 20 and optimizer.state()["x.step"].shape == ()


def test_memory_does_not_grow_with_the_vocabulary(monkeypatch):
    """Value and gradient of 512 tokens hold some chunks at a time: 12 were measured at each size, and 258 of the larger one when nothing ordered them."""
    monkeypatch.setattr(logps, "CHUNK_ELEMENTS", 2**16)
    rng, chunk = np.random.default_rng(0), 4 * 2**16  # bytes
    hidden, held = mx.array(rng.standard_normal((512, 16)).astype(np.float32)), {}
    for vocab in (2048, 32768):
        weight, targets = mx.array(rng.standard_normal((vocab, 16)).astype(np.float32)), mx.array(rng.integers(0, vocab, 512))
        mx.eval(hidden, weight, targets)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.value_and_grad(lambda h, w=weight, t=targets: mx.sum(logps.token_logps(lambda x: x @ w.T, h, t)))(hidden))
        held[vocab] = (mx.get_peak_memory() - before) / chunk
    assert max(held.values()) < 30, held  # some are in flight, which depends on the moment; all logits of the larger one are 256


def test_clip_is_global_and_torchs():
    grads = {"a": np.full((2, 3), 3.0, np.float32), "b": np.full(4, -1.0, np.float32)}
    total = np.sqrt(6 * 9 + 4)
    clipped, norm = clip({k: mx.array(g) for k, g in grads.items()}, 2.0)
    assert norm.item() == pytest.approx(total, rel=1e-6)
    np.testing.assert_allclose(np.array(clipped["a"]), 3 * 2 / (total + 1e-6), rtol=1e-6)
    untouched, _ = clip({k: mx.array(g) for k, g in grads.items()}, 100.0)
    np.testing.assert_array_equal(np.array(untouched["b"]), grads["b"])


def test_the_norm_is_the_same_bits_in_any_order_of_the_parameters():
    """A checkpoint gives parameters back in the order of their names, which a fresh value head does not have."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        grads = {f"{i}.{kind}": mx.array(rng.standard_normal(7).astype(np.float32)) for i in (0, 2, 4) for kind in ("weight", "bias")}
        assert norm(dict(sorted(grads.items()))).item() == norm(grads).item() == norm(dict(reversed(grads.items()))).item()


def test_value_head_forward_and_its_gradients():
    rng = np.random.default_rng(0)
    states = rng.standard_normal((6, 32)).astype(np.float32) * 3 + 1
    head = value.initial_head(32, 0.4, seed=3)
    np.testing.assert_allclose(np.array(value.value(head, mx.array(states))), 0.4, atol=1e-7)
    head["4.weight"] = mx.array(rng.standard_normal((1, 32)).astype(np.float32))
    w = {k: np.array(a).astype(np.float64) for k, a in head.items()}
    x = states.astype(np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = np.maximum(x @ w["0.weight"].T + w["0.bias"], 0)
    x = np.maximum(x @ w["2.weight"].T + w["2.bias"], 0)
    np.testing.assert_allclose(np.array(value.value(head, mx.array(states))), (x @ w["4.weight"].T + w["4.bias"])[:, 0], rtol=2e-5, atol=1e-6)
    by_states = mx.grad(lambda s: mx.sum(value.value(head, s)))(mx.array(states))
    assert np.abs(np.array(by_states)).max() == 0  # the language model learns nothing from the value loss


def test_fit_reaches_the_expectile():
    states = np.zeros((1, 16), np.float32)  # one prompt: V can only be a number
    reward = np.array([0.0, 1.0], np.float32)
    head = value.initial_head(16, 0.5, seed=0)
    fitted, _ = value.fit(head, states, np.zeros(2, np.int64), reward, expectile=0.8, steps=400, lr=3e-3)
    # the minimum of 0.8 (1 - v)^2 + 0.2 v^2
    assert value.value(fitted, mx.array(states)).item() == pytest.approx(0.8, abs=0.01)
