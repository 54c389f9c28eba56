"""Every function of `Ops` on every interpreter: values and gradients at ordinary points, at 0, at +-20 and +-60, at inf and at ties.

The expected numbers are closed forms in float64 (mpmath where float64 would lose digits), written here and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mpmath as mp
import numpy as np
import pytest
from interpreters import NAMES, Interpreter, close, interpreter

from upo.ops import Ops

INF = float("inf")
RNG = np.random.default_rng(0)
RANDOM = RNG.normal(0, 3, 64)
POINTS = np.float32([0.0, -0.0, 1e-3, -1e-3, 20, -20, 60, -60, *RANDOM]).astype(np.float64)  # as exact in float32 as in float64
ENDS = np.array([INF, -INF, 1e3, -1e3])
TIED = np.full(40, 1.7).astype(np.float32).astype(np.float64)
BELOW = np.float32([-1e-7, -1e-3, -0.5, -0.6931, -0.6932, -1, -20, -60, *-np.abs(RANDOM)]).astype(np.float64)
SEGMENT = np.repeat([2, 0, 1], [30, 4, 30])[RNG.permutation(64)]


@dataclass
class Case:
    """One point of the contract: op(*floats, *rest) = value, and the gradient of sum(weight * op) by each of the floats."""

    floats: list[np.ndarray]
    value: Any
    gradient: list[Any] | None = None  # None: has none
    rest: tuple[Any, ...] = ()
    weight: Any = 1.0
    call: Callable[..., Any] | None = None  # (interpreter, op, floats...) where the arguments come in another way
    named: dict[str, Any] = field(default_factory=dict)
    tails: bool = False  # small numbers are as good as large ones: the tolerance is relative only


def precise(function: Callable[[Any], Any], points: np.ndarray) -> np.ndarray:
    """float64 values of an mpmath function, computed with 60 digits."""
    with mp.workdps(60):
        return np.array([float(function(mp.mpf(float(x)))) for x in points])


def sigmoid(x: Any) -> Any:
    return 1 / (1 + mp.exp(-x))


def elementwise(value: Callable[[Any], Any], slope: Callable[[Any], Any], points: np.ndarray, tails: bool = False) -> Case:
    return Case([points], precise(value, points), [precise(slope, points)], tails=tails)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def with_indices(index: np.ndarray, *rest: Any) -> Callable[..., Any]:
    return lambda i, op, x: op(x, i.indices(index), *rest)


def segment_cases(reduce: Callable[[np.ndarray], float], slope: Callable[[np.ndarray], np.ndarray], x: np.ndarray, segment: np.ndarray, count: int) -> Case:
    weight = np.arange(1.0, count + 1)
    gradient = np.zeros(len(x))
    for s in range(count):
        gradient[segment == s] = weight[s] * slope(x[segment == s])
    value = np.array([reduce(x[segment == s]) for s in range(count)])
    return Case([x], value, [gradient], weight=weight, call=with_indices(segment, count))


def scan_case(length: int) -> Case:
    x, decay = RNG.normal(size=length), RNG.uniform(0.5, 1, length)
    decay[::5] = 0.0  # as at the end of a completion
    weight = RNG.normal(size=length)
    value, gradient = np.zeros(length), np.zeros(length)
    for t in range(length):
        factor = 1.0
        for s in range(t, length):
            value[t] += factor * x[s]
            gradient[s] += weight[t] * factor
            factor *= decay[s]
    return Case([x, decay], value, [gradient, np.zeros(length)], weight=weight)


MATRIX = RNG.normal(size=(3, 40))
ROWS = RNG.normal(size=(5, 2))
REPEATED = np.array([4, 0, 0, 2, 0])
CONDITION = POINTS > 0
TIED_ORDER = np.repeat([2.0, 1.0, 2.0, 0.0], 40)

CASES: dict[str, list[Case]] = {
    "exp": [elementwise(mp.exp, mp.exp, POINTS, tails=True), Case([ENDS], [INF, 0, INF, 0], [[INF, 0, INF, 0]])],
    "log": [elementwise(mp.log, lambda x: 1 / x, np.abs(POINTS[2:])), Case([np.array([0.0, INF])], [-INF, INF], [[INF, 0]])],
    "log_sigmoid": [
        elementwise(lambda x: -mp.log1p(mp.exp(-x)), lambda x: sigmoid(-x), POINTS, tails=True),
        Case([ENDS], [0, -INF, 0, -1e3], [[0, 1, 0, 1]]),
        Case([np.zeros(40)], np.full(40, -np.log(2)), [np.full(40, 0.5)]),
    ],
    "sigmoid": [
        elementwise(sigmoid, lambda x: sigmoid(x) * sigmoid(-x), POINTS),
        Case([ENDS], [1, 0, 1, 0], [[0, 0, 0, 0]]),
        Case([np.zeros(40)], np.full(40, 0.5), [np.full(40, 0.25)]),
    ],
    "log1mexp": [
        elementwise(lambda x: mp.log(-mp.expm1(x)), lambda x: mp.exp(x) / mp.expm1(x), BELOW, tails=True),
        Case([np.array([0.0, -INF, -1e3])], [-INF, 0, 0], [[-INF, 0, 0]]),
    ],
    "relu": [
        Case([POINTS], np.where(POINTS > 0, POINTS, 0), [np.where(POINTS > 0, 1.0, 0.0)]),
        Case([ENDS], [INF, 0, 1e3, 0], [[1, 0, 1, 0]]),
        Case([np.zeros(40)], np.zeros(40), [np.zeros(40)]),
    ],
    "where": [
        Case([POINTS, 2 * POINTS], np.where(CONDITION, POINTS, 2 * POINTS), [CONDITION * 1.0, ~CONDITION * 1.0], call=lambda i, op, x, y: op(x > 0, x, y)),
        Case([POINTS], np.where(CONDITION, POINTS, -1.5), [CONDITION * 1.0], call=lambda i, op, x: op(x > 0, x, -1.5)),
        Case([POINTS], np.where(CONDITION, -1.5, POINTS), [~CONDITION * 1.0], call=lambda i, op, x: op(x > 0, -1.5, x)),
        # A steep but finite branch that is not taken leaves nothing behind.
        Case([np.array([60.0, -60.0])], [1.0, np.exp(-60.0)], [[0, np.exp(-60.0)]], call=lambda i, op, x: op(x > 0, 1.0, i.ops.exp(x))),
    ],
    "sum": [
        Case([MATRIX], MATRIX.sum(), [np.ones((3, 40))]),
        Case([MATRIX], MATRIX.sum(1), [np.outer([1, 2, 3], np.ones(40))], named={"axis": 1}, weight=np.array([1.0, 2, 3])),
        Case([MATRIX], MATRIX.sum(0), [np.ones((3, 40))], named={"axis": 0}),
        Case([np.zeros(0)], 0.0, [np.zeros(0)]),  # a micro-batch without pairs; MLX's own sum may not return
        Case([np.zeros((3, 0))], np.zeros(3), [np.zeros((3, 0))], named={"axis": 1}),
    ],
    "logsumexp": [
        Case([TIED], TIED[0] + np.log(40), [np.full(40, 1 / 40)]),
        Case([POINTS], np.logaddexp.reduce(POINTS), [softmax(POINTS)]),
        Case([-POINTS * 10], np.logaddexp.reduce(-POINTS * 10), [softmax(-POINTS * 10)]),
        Case([MATRIX], np.logaddexp.reduce(MATRIX.ravel()), [softmax(MATRIX.ravel()).reshape(3, 40)]),
        Case([MATRIX], np.logaddexp.reduce(MATRIX, 1), [np.array([softmax(r) for r in MATRIX])], named={"axis": 1}),
        Case([np.array([-INF, 0.0, 0.0])], np.log(2), [[0, 0.5, 0.5]]),
    ],
    "stop_gradient": [Case([POINTS], POINTS, [0 * POINTS])],
    "take": [
        Case([RANDOM[:5]], RANDOM[REPEATED], [[2 + 3 + 5, 0, 4, 0, 1]], weight=np.arange(1.0, 6), call=with_indices(REPEATED)),
        Case([ROWS], ROWS[REPEATED], [np.outer([3, 0, 1, 0, 1], [1, 1])], call=with_indices(REPEATED)),
        Case([RANDOM[:5]], np.zeros(0), [np.zeros(5)], call=with_indices(np.zeros(0, int))),
    ],
    "argsort_stable": [
        Case([RANDOM], np.argsort(RANDOM)),
        Case([np.zeros(40)], np.arange(40)),
        Case([TIED_ORDER], np.concatenate([np.arange(120, 160), np.arange(40, 80), np.arange(40), np.arange(80, 120)])),
        Case([np.array([INF, 60.0, -INF, 0.0, -60.0, INF])], [2, 4, 3, 1, 0, 5]),
    ],
    "segment_sum": [
        segment_cases(np.sum, np.ones_like, RANDOM, SEGMENT, 3),
        segment_cases(np.sum, np.ones_like, RANDOM, SEGMENT, 5),  # the last two are empty and give 0
        segment_cases(np.sum, np.ones_like, np.zeros(0), np.zeros(0, int), 2),
    ],
    "segment_logsumexp": [
        segment_cases(np.logaddexp.reduce, softmax, RANDOM, SEGMENT, 3),
        segment_cases(np.logaddexp.reduce, softmax, np.r_[TIED, TIED, -60.0, 20], np.r_[np.ones(40, int), np.zeros(40, int), 1, 2], 3),
        segment_cases(np.logaddexp.reduce, softmax, np.array([-INF, 1.0, 1e3, -1e3]), np.array([0, 0, 1, 1]), 2),
    ],
    "reverse_scan": [scan_case(1), scan_case(2), scan_case(37), scan_case(64)],
}

METHODS = [name for name, member in vars(Ops).items() if inspect.isfunction(member) and not name.startswith("_")]


def evaluate(i: Interpreter, name: str, case: Case, *arrays: Any) -> Any:
    op = getattr(i.ops, name)
    return case.call(i, op, *arrays) if case.call else op(*arrays, *case.rest, **case.named)


@pytest.mark.parametrize("name", METHODS)
def test_every_op_has_cases(name: str) -> None:
    assert CASES.get(name), f"add cases for {name}: a new op needs its contract"


def test_no_case_without_op() -> None:
    assert set(CASES) == set(METHODS)


@pytest.mark.parametrize("framework", NAMES)
def test_signatures(framework: str) -> None:
    ops = interpreter(framework).ops
    public = {name for name in dir(type(ops)) if not name.startswith("_")}
    assert public == {*METHODS, "name"} and ops.name == framework
    for name in METHODS:
        assert inspect.signature(getattr(type(ops), name)) == inspect.signature(getattr(Ops, name)), name


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("framework", NAMES)
def test_values(framework: str, name: str) -> None:
    i = interpreter(framework)
    for case in CASES[name]:
        found = i.numpy(evaluate(i, name, case, *map(i.floats, case.floats)))
        close(i, "value", found, case.value, case.tails)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("framework", [n for n in NAMES if n != "numpy"])
def test_gradients(framework: str, name: str) -> None:
    i = interpreter(framework)
    for case in CASES[name]:
        if case.gradient is None:
            continue
        weight = i.floats(np.broadcast_to(case.weight, np.shape(case.value)))
        found = i.gradient(lambda *xs, c=case, w=weight: i.ops.sum(evaluate(i, name, c, *xs) * w), case.floats)
        for g, expected in zip(found, case.gradient, strict=True):
            close(i, "gradient", g, expected, case.tails)


@pytest.mark.parametrize("name", ["exp", "log_sigmoid", "sigmoid", "relu", "log", "log1mexp", "sum", "logsumexp"])
@pytest.mark.parametrize("framework", NAMES)
def test_nan_stays_nan(framework: str, name: str) -> None:
    i = interpreter(framework)
    assert np.isnan(i.numpy(getattr(i.ops, name)(i.floats([np.nan, np.nan])))).all()


@pytest.mark.parametrize("framework", [n for n in NAMES if n != "numpy"])
def test_sorting_inside_a_gradient(framework: str) -> None:
    """take(x, argsort_stable(x)) with x under differentiation: the gradient is permuted back, ties by position."""
    i = interpreter(framework)
    x, weight = np.r_[RANDOM[:5], np.zeros(3)], np.arange(1.0, 9)
    order, expected = np.argsort(x, kind="stable"), np.zeros(8)
    expected[order] = weight
    found = i.gradient(lambda a: i.ops.sum(i.ops.take(a, i.ops.argsort_stable(a)) * i.floats(weight)), [x])[0]
    close(i, "gradient", found, expected)


def everything(ops: Ops, x: Any, index: Any) -> Any:
    """A scalar that passes through every op, for tracing."""
    below = -ops.exp(x) - 0.1
    kept = ops.take(ops.log_sigmoid(x) + ops.sigmoid(x) * ops.log1mexp(below) + ops.log(-below), ops.argsort_stable(x))
    parts = ops.segment_sum(kept, index, 3) + ops.segment_logsumexp(kept, index, 3)
    scanned = ops.reverse_scan(ops.relu(x), ops.where(x > 0, 0.9 + 0 * x, 0.5))
    return ops.logsumexp(parts) + ops.sum(scanned * ops.stop_gradient(x))


def test_torch_compiles_without_a_break() -> None:
    i = interpreter("torch")
    import torch

    compiled = torch.compile(lambda x, index: everything(i.ops, x, index), fullgraph=True, backend="aot_eager")
    index = i.indices(SEGMENT)
    eager, traced = (i.gradient(lambda x, f=f: f(x, index), [RANDOM]) for f in (lambda x, k: everything(i.ops, x, k), compiled))
    close(i, "gradient", traced[0], eager[0])
    assert np.abs(eager[0]).max() > 0.1


@pytest.mark.slow  # on a CPU, MLX calls the C++ compiler for every fused kernel
def test_mlx_compiles() -> None:
    i = interpreter("mlx")
    import mlx.core as mx

    def gradient(x: Any, index: Any) -> Any:
        return mx.grad(lambda a: everything(i.ops, a, index))(x)

    arguments = i.floats(RANDOM), i.indices(SEGMENT)
    eager = i.numpy(gradient(*arguments))
    try:
        mx.enable_compile()
        traced = i.numpy(mx.compile(gradient)(*arguments))
    finally:
        mx.disable_compile()
    close(i, "gradient", traced, eager)
    assert np.abs(eager).max() > 0.1
