"""Numbers, ticks and drawings of the report."""

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from eval_probes.report.charts import BUCKETS, DotPlot, Interval, curve, number, ticks


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (12345.6, "12\u202f346"),
        (-3.25, "−3.25"),
        (0.0312, "0.0312"),
        (5e-4, "5 × 10⁻⁴"),
        (2.5e7, "2.5 × 10⁷"),
        (math.nan, "not a number"),
        (-math.inf, "−∞"),
    ],
)
def test_number(value, words):
    assert number(value) == words


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.996, 1), (-3, 17), (5.2, 5.2), (0, 0), (1e-9, 3e-4), (2e6, 9e6)])
def test_ticks_cover_the_range_in_equal_round_steps(low, high):
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 8
    steps = [b - a for a, b in pairwise(found)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-6)


def parsed(svg) -> ElementTree.Element:
    return ElementTree.fromstring(str(svg))


def test_curve_breaks_where_a_value_is_not_finite():
    drawn = curve("Loss", [1, 2, 3, 4, 5], [5, 4, math.nan, 3, 2])
    assert drawn is not None
    lines = [e for e in parsed(drawn.svg).iter("path") if e.get("class") == "line"]
    assert [e.get("d", "").count(" L") for e in lines] == [1, 1]
    assert drawn.last == "2"


def test_curve_of_nothing_finite_is_not_drawn():
    assert curve("Loss", [1, 2], [math.nan, math.inf]) is None


def test_long_curve_is_a_mean_inside_its_band():
    steps = list(range(1, 100_001))
    drawn = curve("Loss", steps, [math.sin(s) for s in steps])
    assert drawn is not None
    assert len(drawn.svg) < 40_000
    (line,) = [e for e in parsed(drawn.svg).iter("path") if e.get("class") == "line"]
    assert line.get("d", "").count(" L") < BUCKETS
    assert any(e.get("class") == "band" for e in parsed(drawn.svg).iter("path"))


def test_words_in_a_curve_are_escaped():
    drawn = curve("<b>", [1, 2], [1, 2], alarms=[(1, "<script>")], reference=(1.5, "<i>"))
    assert drawn is not None
    assert not re.search("<script>|<b>|<i>", drawn.svg)
    assert [e.text for e in parsed(drawn.svg).iter("title")] == ["<script>", "step 2: 2"]


def test_reference_far_from_the_curve_is_left_out():
    near, far = (curve("Loss", [1, 2], [5, 6], reference=(r, "here")) for r in (6.5, 60.0))
    assert near is not None
    assert far is not None
    assert "here" in near.svg
    assert "here" not in far.svg


def test_dots_lie_where_their_values_are():
    plot = DotPlot([Interval(0.4, 0.5, 0.6, "trained")], chance=0.1)
    row = parsed(plot.row([Interval(0.4, 0.5, 0.6, "trained")], "half & half"))
    (dot,) = row.iter("circle")
    low, high = plot.ticks[0], plot.ticks[-1]
    assert float(dot.get("cx", "").rstrip("%")) == pytest.approx(2 + 96 * (0.5 - low) / (high - low), abs=0.01)
    assert [t.text for t in parsed(plot.axis()).iter("text")] == [number(100 * t) for t in plot.ticks]
