"""Charts: ticks cover, the front is the front, labels and bars stay inside."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from dit_accel_eval.report.charts import Point, Scatter, ticks, timeline


@pytest.mark.parametrize(
    "bounds", [(0, 1), (0.13, 0.14), (-3, 7), (12.3, 48.9), (5, 5), (0, 0), (1e-9, 3e-9), (-1e6, 2e6)]
)
def test_ticks_cover_their_range_in_even_steps(bounds: tuple[float, float]) -> None:
    found = ticks(*bounds)
    assert found[0] <= bounds[0]
    assert found[-1] >= bounds[1]
    assert 2 <= len(found) <= 9
    steps = [b - a for a, b in itertools.pairwise(found)]
    assert all(step == pytest.approx(steps[0]) and step > 0 for step in steps)


@pytest.mark.parametrize("bounds", [(1, 0), (0, math.inf), (math.nan, 1)])
def test_ticks_refuse_what_is_no_range(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="finite bounds"):
        ticks(*bounds)


def _chart(points: list[Point], **kind: bool) -> Scatter:
    return Scatter("t", "x", "y", points, floor=1.0, reference=1.0, **kind)


@pytest.mark.parametrize("lower_x", [True, False])
@pytest.mark.parametrize("higher_y", [True, False])
def test_the_front_is_what_nobody_beats(lower_x: bool, higher_y: bool) -> None:
    rng = random.Random(3)
    points = [Point(i, rng.randint(0, 9) / 9, rng.randint(0, 9), "") for i in range(30)]

    def beats(a: Point, b: Point) -> bool:
        x = (b.x - a.x) if lower_x else (a.x - b.x)
        y = (a.y - b.y) if higher_y else (b.y - a.y)
        return x >= 0 and y >= 0 and (x > 0 or y > 0)

    expected = {(p.x, p.y) for p in points if not any(beats(other, p) for other in points)}
    assert {(p.x, p.y) for p in _chart(points, lower_x=lower_x, higher_y=higher_y).front} == expected


def test_points_and_labels_lie_inside_and_apart() -> None:
    points = [Point(i, 0.3 + 0.02 * i, 20 + i, "") for i in range(6)]
    chart = _chart(points)
    marks = chart.marks
    for mark in marks:
        assert chart.left <= mark.x <= chart.right
        assert chart.top <= mark.y <= chart.bottom
        assert chart.left <= mark.label_x <= chart.right
        assert chart.top <= mark.label_y <= chart.bottom
    for a, b in itertools.combinations(marks, 2):
        assert abs(a.label_x - b.label_x) >= 14 or abs(a.label_y - b.label_y) >= 11
    low, high = min(marks, key=lambda m: m.point.y), max(marks, key=lambda m: m.point.y)
    assert low.y > high.y  # more is further up


def test_timelines_show_dense_steps_as_dense() -> None:
    bars = timeline([(0, 1.0), (1, 1.4), (2, 0.2)], steps=4, width=400)
    assert [bar.dense for bar in bars] == [True, True, False]
    assert [bar.x for bar in bars] == [0, 100, 200]
    assert bars[1].height > bars[0].height == pytest.approx(5 * bars[2].height, rel=0.01)
    assert all(bar.y >= 0 for bar in bars)
    with pytest.raises(ValueError, match="at least one step, got 0"):
        timeline([], steps=0)
