"""The Pareto front: the points that no other one beats in every respect."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pareto_front(points: Sequence[Sequence[float]]) -> list[bool]:
    """Which points are on the front. Each is a row of numbers, one per objective, the larger the better.

    A point is beaten by one that is nowhere worse and somewhere better; equal points are on it together. One with a number that is not
    finite cannot be compared: it is not on the front and beats nobody.
    """
    valid = [all(math.isfinite(x) for x in point) for point in points]
    return [
        ok and not any(other_ok and beats(other, point) for other, other_ok in zip(points, valid, strict=True))
        for point, ok in zip(points, valid, strict=True)
    ]


def beats(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether a is nowhere worse than b and somewhere better."""
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))
