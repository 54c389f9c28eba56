"""float16 gradients: the loss is scaled, so that what one token adds to a step is not rounded to nothing."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
from learner_runs import configure, examples, shake, with_reference

from upo.backend import get_backend
from upo.errors import NonFiniteError
from upo.learner import loss_scales

WEAK = {"preference": {"loss": "dpo", "beta": 1e-5}}  # a token's part is then about beta / rows / 2 = 6e-7 before the head, times weights of 0.02


def step(backend: str, folder, dtype: str, objective: dict = WEAK):
    """Gradient norm of one step of rmsprop, and what it did to the adapter."""
    optimizer = {"name": "rmsprop", "clip": 1e9}
    learner = get_backend(backend).load(configure(folder, objective, backend=backend, device="cpu", dtype=dtype, optimizer=optimizer))
    shake(learner)
    batch = replace(with_reference(learner, examples()), partners=None, partner_ref_logp=None)
    before = learner.state()["adapter"]
    norm = learner.step(batch, 1e-3).grad_norm
    after = learner.state()["adapter"]
    return norm, np.concatenate([(after[name] - before[name]).ravel() for name in sorted(after)])


def scaled_by(backend: str, monkeypatch, *scales: float) -> None:
    monkeypatch.setattr(importlib.import_module(f"upo_{backend}.step"), "loss_scales", lambda _: scales)


def test_a_weak_loss_has_a_gradient(backend, tiny_llama, monkeypatch):
    """The norm is float32's, and what moves the other way is near zero (measured: 0.1 % of the numbers); without the scale a quarter does."""
    whole, expected = step(backend, tiny_llama, "float32")
    half, moved = step(backend, tiny_llama, "float16")
    assert half == pytest.approx(whole, rel=0.02)
    assert np.mean(np.sign(moved) != np.sign(expected)) < 0.01
    scaled_by(backend, monkeypatch, 1.0)
    _, bare = step(backend, tiny_llama, "float16")
    assert np.mean(np.sign(bare) != np.sign(expected)) > 0.1, "the fault of which this is the remedy"


def test_an_overflow_is_computed_again(backend, tiny_llama, monkeypatch):
    expected = step(backend, tiny_llama, "float16")
    scaled_by(backend, monkeypatch, 2.0**40, 1024.0)
    found = step(backend, tiny_llama, "float16")
    assert found[0] == expected[0]
    np.testing.assert_array_equal(found[1], expected[1])
    scaled_by(backend, monkeypatch, 2.0**40)
    with pytest.raises(NonFiniteError):
        step(backend, tiny_llama, "float16")


def test_other_formats_are_not_scaled():
    assert loss_scales("float32") == loss_scales("bfloat16") == (1.0,)
    assert all(np.log2(scale) % 1 == 0 for scale in loss_scales("float16")) and loss_scales("float16")[-1] == 1.0
