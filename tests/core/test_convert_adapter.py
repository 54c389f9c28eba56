"""The neutral form: exact moves and scales, padding, and the measure of equality."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from upo.convert.adapter import (
    Adapter,
    Module,
    Tensor,
    check_equal,
    difference,
    from_values,
    joined,
    multiplied,
    padded,
    rescaled,
    trimmed,
    uniform,
)
from upo.errors import ModelError

RNG = np.random.default_rng(0)


def module(rank: int = 4, scale: float = 2.0, dtype: str = "F32", shape: tuple[int, ...] = (12, 8)) -> Module:
    *experts, out, into = shape
    return Module("experts" if experts else "linear", from_values(RNG.normal(size=(*experts, rank, into)), dtype), from_values(RNG.normal(size=(*experts, out, rank)), dtype), scale)


def delta(m: Module) -> np.ndarray:
    return m.scale * m.b.values() @ m.a.values()


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
def test_values_and_casts(dtype: str) -> None:
    tensor = from_values(np.array([1.0, -0.5, 3.0, 2**-10]), dtype)
    np.testing.assert_array_equal(tensor.values(), [1.0, -0.5, 3.0, 2**-10])
    assert tensor.dtype == dtype and tensor.cast(dtype) is tensor and tensor.same(tensor.moved(np.copy)) and not tensor.same(tensor.moved(np.negative if dtype != "BF16" else np.invert))
    assert tensor.cast("F32").dtype == "F32"


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_a_power_of_two_is_exact_in_its_own_dtype(dtype: str) -> None:
    tensor = from_values(RNG.normal(size=50), dtype)
    for factor in (2.0, 0.25, -8.0):
        result = multiplied(tensor, factor)
        assert result.dtype == dtype
        np.testing.assert_array_equal(result.values(), tensor.values() * factor)
    third = multiplied(tensor, 1 / 3)
    assert third.dtype == "F32"
    np.testing.assert_allclose(third.values(), tensor.values() / 3, rtol=2**-23)


def test_half_precision_that_would_over_or_underflow_widens() -> None:
    assert multiplied(from_values(np.array([40000.0]), "F16"), 4.0).dtype == "F32"
    tiny = from_values(np.array([2.0**-24]), "F16")
    assert multiplied(tiny, 0.5).dtype == "F32" and multiplied(tiny, 0.5).values()[0] == 2.0**-25


def test_joined_widens_only_what_differs() -> None:
    a, b = from_values(np.ones(2), "BF16"), from_values(np.full(2, 3.0), "F16")
    assert joined([a, a], 0).dtype == "BF16"
    both = joined([a, b], 0)
    assert both.dtype == "F32" and both.values().tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("shape", [(12, 8), (3, 12, 8)])
def test_padding_changes_nothing_and_comes_off(shape: tuple[int, ...]) -> None:
    one = module(shape=shape, dtype="BF16")
    wide = padded(one, 7)
    assert wide.rank == 7 and wide.a.dtype == "BF16"
    np.testing.assert_array_equal(delta(wide), delta(one))
    back = trimmed(wide)
    assert back.a.same(one.a) and back.b.same(one.b)
    assert trimmed(one) is one and padded(one, 4) is one


def test_only_dead_ranks_come_off() -> None:
    fresh = replace(module(), b=from_values(np.zeros((12, 4)), "F32"))
    assert trimmed(fresh).rank == 4  # B = 0 as at the start of a training: A is alive
    assert trimmed(replace(fresh, a=from_values(np.zeros((4, 8)), "F32"))).rank == 1


def test_uniform() -> None:
    modules = {"a": module(2, 2.0), "b": module(4, 2.0), "c": module(3, 1.0), "d": module(4, 3.0), "z": module(4, 0.0)}
    result, rank, scale, notes = uniform(modules)
    assert (rank, scale) == (4, 2.0)
    for path, one in modules.items():
        assert result[path].rank == 4 and result[path].scale == 2.0
        np.testing.assert_allclose(delta(result[path]), delta(one), atol=2e-6)  # float32 rounding of sums of 4 products below 10
    np.testing.assert_array_equal(delta(result["c"]), delta(modules["c"]))
    assert "2 of 5 modules have a rank below 4" in notes[0] and "3 of 5 modules" in notes[1] and "1 by no power of two" in notes[1]
    assert uniform({"a": modules["a"]})[3] == []
    assert uniform({"z": modules["z"]})[2] == 1.0


def test_difference_is_that_of_the_products() -> None:
    one, other = module(4), module(6, 0.7)
    want = np.linalg.norm(delta(one) - delta(other)) / np.linalg.norm(delta(one))
    assert difference(one, other) == pytest.approx(want, rel=1e-12)
    assert difference(one, rescaled(one, 3.0)) < 1e-7
    assert difference(one, replace(one, scale=2.0 * (1 + 1e-9))) == pytest.approx(1e-9, rel=1e-3)  # no cancellation
    turned = np.linalg.qr(RNG.normal(size=(4, 4)))[0]  # other matrices, the same product
    assert difference(one, replace(one, a=Tensor("F64", turned.T @ one.a.values()), b=Tensor("F64", one.b.values() @ turned))) < 1e-14
    stacked = module(shape=(3, 12, 8))
    moved = replace(stacked, b=stacked.b.moved(lambda x: x[[1, 0, 2]]))
    assert difference(stacked, moved) > 0.5
    assert difference(one, module(shape=(12, 9))) == difference(one, replace(one, kind="embedding")) == difference(one, replace(one, tied=True)) == float("inf")
    nothing = replace(one, scale=0.0)
    assert difference(nothing, nothing) == 0.0 and difference(nothing, one) == float("inf")


def test_check_equal() -> None:
    source = Adapter("m", {"a": module(), "b": module()}, 0.0)
    assert check_equal(source, source, 1e-6) < 1e-14
    with pytest.raises(ModelError, match="b is only on one side"):
        check_equal(source, replace(source, modules={"a": source.modules["a"]}), 1e-6)
    silent = replace(module(), b=from_values(np.zeros((12, 4)), "F32"))
    assert check_equal(source, replace(source, modules={**source.modules, "c": silent}), 1e-6) < 1e-14
    dora = {p: replace(m, magnitude=from_values(np.ones(12), "F32")) for p, m in source.modules.items()}
    with pytest.raises(ModelError, match=r"a: scale . B . A or its magnitude differs by inf"):
        check_equal(source, replace(source, modules=dora), 1e-6)
    off = {**dora, "b": replace(dora["b"], magnitude=from_values(np.full(12, 1.001), "F32"))}
    with pytest.raises(ModelError, match=r"b: .*differs by 0\.001"):
        check_equal(replace(source, modules=dora), replace(source, modules=off), 1e-6)
