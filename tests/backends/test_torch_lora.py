"""The LoRA layer as one node for autograd, against its formula differentiated by the framework; its switches; one vector of gradients."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
from torch_models import forest, gradients, tiny  # noqa: E402

from upo.data.packed import packed  # noqa: E402
from upo_torch.lora import Adapted  # noqa: E402
from upo_torch.state import Optimizer  # noqa: E402


def drawn(*shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (0, 7)])
def test_the_node_is_the_formula(shape, biased):
    """In float64, so that only rounding of 1e-16 stands between the two; masters would be float32, which the second test holds."""
    torch.manual_seed(0)
    x, a, b = drawn(*shape), drawn(4, 7), drawn(5, 4)
    weight, bias = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, dtype=torch.float64) if biased else None
    expected = x @ weight.T + (0 if bias is None else bias) + 1.7 * (x @ a.T) @ b.T
    found = Adapted.apply(x, weight, bias, a, b, 1.7)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    up = torch.randn_like(expected)
    ours = torch.autograd.grad(found, (x, a, b), up)
    for mine, theirs in zip(ours, torch.autograd.grad(expected, (x, a, b), up), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)  # those of masters are float32 on their way


def test_sixteen_bits_and_what_needs_no_gradient():
    """bfloat16 products of float32 masters; an input that is a constant gets no gradient; strided gradients are made dense."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 6, dtype=torch.bfloat16), torch.randn(5, 6, dtype=torch.bfloat16)
    a, b = drawn(2, 6, dtype=torch.float32), drawn(5, 2, dtype=torch.float32)
    out = Adapted.apply(x, weight, None, a, b, 0.5)
    up = torch.randn(5, 3, dtype=torch.bfloat16).T
    da, db = torch.autograd.grad(out, (a, b), up)
    wide = x.float() @ weight.float().T + 0.5 * (x.float() @ a.T) @ b.T
    ea, eb = torch.autograd.grad(wide, (a, b), up.float())
    assert out.dtype == torch.bfloat16 and da.dtype == db.dtype == torch.float32
    for mine, exact in ((out.float(), wide), (da, ea), (db, eb)):
        assert float((mine - exact).detach().norm() / exact.detach().norm()) < 0.02  # 8 bits, a few roundings in a row


def test_a_layer_without_the_active_adapter_is_its_base():
    """A reference may lie on fewer layers than the policy; off is off."""
    model = tiny("llama")
    (path, layer), *_ = ((p, m) for p, m in model.net.named_modules() if hasattr(m, "lora_A"))
    x = torch.randn(2, layer.in_features)
    base = layer.base_layer(x)
    assert float((layer(x) - base).detach().abs().max()) > 1e-2
    model.add_reference(None)
    with model.reference(0):
        torch.testing.assert_close(layer(x), base, rtol=0, atol=0)
    kept = {side: getattr(layer, side).pop("default") for side in ("lora_A", "lora_B")}
    torch.testing.assert_close(layer(x), base, rtol=0, atol=0)
    assert path and all(p.requires_grad for p in (kept["lora_A"].weight, kept["lora_B"].weight))


def test_gradients_are_places_of_one_vector():
    """Two backward passes add up in it, clipping scales it, and the norm is that of all of them."""
    model = tiny("llama")
    optimizer = Optimizer("adamw", model.policy)
    optimizer.zero_grad()
    before = {name: p.grad.data_ptr() for name, p in model.policy.items()}
    for _ in range(2):
        layout = packed(forest())
        hidden = model.hidden_of(layout)
        hidden.square().sum().backward()
    assert {name: p.grad.data_ptr() for name, p in model.policy.items()} == before
    twice = {name: p.grad.clone() for name, p in model.policy.items()}
    whole = float(torch.sqrt(sum(g.double().square().sum() for g in twice.values())))
    assert optimizer.clip(1.0) == pytest.approx(whole, rel=1e-5) and whole > 10
    for name, p in model.policy.items():
        torch.testing.assert_close(p.grad, twice[name] / (whole + 1e-6), rtol=1e-5, atol=1e-7)
    optimizer.zero_grad()
    assert all(not p.grad.any() for p in model.policy.values())
    assert optimizer.clip(1.0) == 0.0


def test_the_gradient_is_that_of_the_plain_layer():
    """The whole model against PEFT's own forward pass of its layers."""
    model = tiny("llama")
    logps, slope = gradients(model, packed(forest()))
    for layer in model.net.modules():
        if hasattr(layer, "lora_A"):
            del layer.forward  # the class's own is in force again
    plain, plain_slope = gradients(model, packed(forest()))
    np.testing.assert_allclose(logps, plain, atol=1e-4, rtol=0)
    assert np.abs(plain).min() > 0.1
    for name, own in plain_slope.items():
        np.testing.assert_allclose(slope[name], own, atol=1e-4 * np.abs(own).max())
