"""SVG elements: escaping, and round numbers for axes."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upo import svg


def test_everything_is_escaped():
    assert svg.element("g", "<a/>", class_="x", stroke_width=1.50, data_x='"<&>') == '<g class="x" stroke-width="1.5" data-x="&quot;&lt;&amp;&gt;"><a/></g>'
    assert svg.text("</text><script>", x=1) == '<text x="1">&lt;/text&gt;&lt;script&gt;</text>'
    assert svg.element("rect", x=0) == '<rect x="0"/>'


def test_a_line_has_a_point_for_each_pair():
    assert svg.polyline([0, 1.25], [2, 3.14159], fill="none") == '<polyline points="0.0,2.0 1.2,3.1" fill="none"/>'
    with pytest.raises(ValueError):
        svg.polyline([0], [1, 2])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.5, 1]), (0, 100, [0, 50, 100]), (-0.13, 0.21, [-0.1, 0, 0.1, 0.2]), (3, 3, [3]), (0, 60, [0, 20, 40, 60]), (0.5e-4, 5e-4, [2e-4, 4e-4])],
)
def test_ticks(low, high, expected):
    assert svg.ticks(low, high, 5) == pytest.approx(expected)


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 8))
def test_ticks_lie_within_and_are_evenly_spaced(low, size, most):
    found = svg.ticks(low, low + size, most)
    slack = 1e-6 * max(size, abs(low))
    assert len(found) <= most and all(low - slack <= t <= low + size + slack for t in found)
    gaps = [b - a for a, b in itertools.pairwise(found)]
    for gap in gaps:
        assert gap == pytest.approx(gaps[0], rel=1e-6, abs=slack)
        if gap > 10 * slack:
            assert round(gap / 10 ** math.floor(math.log10(gap) + 1e-9), 3) in (1, 2, 5)
