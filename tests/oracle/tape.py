"""Numbers of 50 digits that remember how they were made, so that a formula brings its exact gradient. Imports nothing of the library.

A formula is written once, in its textbook form; mpmath's range and digits make stable rearrangements unnecessary. Its derivative follows
the branch that was taken, so at a kink it is the one-sided slope the formula names, where a difference quotient would give a mean.
`plain` stops the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mpmath as mp

DIGITS = 50
CAP = 80  # the documented cap under exponentials that would overflow a float32


class Number:
    """A value and the slopes by the numbers it was made of."""

    __slots__ = ("parents", "value")

    def __init__(self, value: Any, parents: tuple[tuple[Number, Any], ...] = ()) -> None:
        self.value, self.parents = mp.mpf(value), parents

    def __add__(self, other: Any) -> Number:
        return _made(plain(self) + plain(other), (self, 1), (other, 1))

    def __mul__(self, other: Any) -> Number:
        return _made(plain(self) * plain(other), (self, plain(other)), (other, plain(self)))

    def __truediv__(self, other: Any) -> Number:
        return self * reciprocal(other)

    def __rtruediv__(self, other: Any) -> Number:
        return reciprocal(self) * other

    def __neg__(self) -> Number:
        return self * -1

    def __sub__(self, other: Any) -> Number:
        return self + -1 * other

    def __rsub__(self, other: Any) -> Number:
        return -self + other

    def __pow__(self, power: int) -> Number:
        return _made(self.value**power, (self, power * self.value ** (power - 1)))

    __radd__ = __add__
    __rmul__ = __mul__


def _made(value: Any, *parents: tuple[Any, Any]) -> Number:
    return Number(value, tuple((x, mp.mpf(slope)) for x, slope in parents if isinstance(x, Number)))


def plain(x: Any) -> Any:
    """The value without its history: stop-gradient."""
    return x.value if isinstance(x, Number) else mp.mpf(x)


def reciprocal(x: Any) -> Any:
    return _made(1 / x.value, (x, -1 / x.value**2)) if isinstance(x, Number) else 1 / mp.mpf(x)


def exp(x: Any) -> Number:
    value = mp.exp(plain(x))
    return _made(value, (x, value))


def log(x: Any) -> Number:
    return _made(mp.log(plain(x)), (x, 1 / plain(x)))


def at_most(x: Any, limit: Any) -> Any:
    """min(x, limit); slope 0 from the limit on."""
    return x if plain(x) < mp.mpf(limit) else mp.mpf(limit)


def at_least(x: Any, limit: Any) -> Any:
    """max(x, limit); slope 0 up to the limit."""
    return x if plain(x) > mp.mpf(limit) else mp.mpf(limit)


def capped_exp(x: Any) -> Number:
    """e^min(x, 80)."""
    return exp(at_most(x, CAP))


def sigmoid(x: Any) -> Number:
    return 1 / (1 + exp(-1 * x))


def log_sigmoid(x: Any) -> Number:
    return log(sigmoid(x))


def total(xs: Sequence[Any]) -> Any:
    return sum(xs, mp.mpf(0))


def mean(xs: Sequence[Any]) -> Any:
    """Of nothing: 0, as for a step without a unit of a kind."""
    return total(xs) / len(xs) if xs else mp.mpf(0)


def log_softmax(xs: Sequence[Any]) -> list[Number]:
    """The largest is taken out as a constant, or the sum would have no digit left for the others."""
    top = max(plain(x) for x in xs)
    lse = log(total([exp(x - top) for x in xs])) + top
    return [x - lse for x in xs]


def gradient(out: Any, leaves: Sequence[Number]) -> list[float]:
    """d out / d leaf for every leaf."""
    order: list[Number] = []
    seen: set[int] = set()
    stack = [(out, False)] if isinstance(out, Number) else []
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((parent, False) for parent, _ in node.parents)
    slopes = {id(out): mp.mpf(1)}
    for node in reversed(order):
        for parent, slope in node.parents:
            slopes[id(parent)] = slopes.get(id(parent), mp.mpf(0)) + slope * slopes[id(node)]
    return [float(slopes.get(id(leaf), mp.mpf(0))) for leaf in leaves]
