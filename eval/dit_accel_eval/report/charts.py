"""Geometry of the charts; the templates turn it into SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Bar", "Mark", "Point", "Scatter", "ticks", "timeline"]

_WIDTH, _HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 14, 44
_LABEL = (16.0, 13.0)
#: Where a label may stand beside its dot, the preferred place first.
_PLACES = tuple(
    (round(reach * math.cos(turn * math.pi / 8), 1), round(-reach * math.sin(turn * math.pi / 8), 1))
    for reach in (16, 24, 34, 46)
    for turn in (2, -2, 6, -6, 4, -4, 0, 8, 1, -1, 3, -3, 5, -5, 7, -7)
)
_BAR_HEIGHT, _MOST = 56, 1.25


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover ``low`` to ``high``.

    Raises:
        ValueError: a bound is not finite, or ``low`` is above ``high``.
    """
    if not (math.isfinite(low) and math.isfinite(high)) or low > high:
        raise ValueError(f"ticks need finite bounds, the lower one first, got {low} and {high}")
    if low == high:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= raw), 10 * power)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 10) for i in range(first, last + 1)]


@dataclass(frozen=True)
class Point:
    """What goes into a scatter chart: a number that names it, its place and what it is."""

    number: int
    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A point in pixels, and where its label stands."""

    point: Point
    x: float
    y: float
    label_x: float
    label_y: float


@dataclass(frozen=True)
class Scatter:
    """A chart of quality against cost.

    Attributes:
        title: what a screen reader says.
        x_label: of the axis.
        y_label: of the axis.
        points: at least one.
        floor: y of the floor, or ``None``.
        reference: x of dense attention, or ``None``.
        lower_x: whether less is better along x.
        higher_y: whether more is better along y.
    """

    title: str
    x_label: str
    y_label: str
    points: Sequence[Point]
    floor: float | None = None
    reference: float | None = None
    lower_x: bool = True
    higher_y: bool = True

    width = _WIDTH
    height = _HEIGHT
    left, right, top, bottom = _LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM

    @property
    def x_ticks(self) -> list[float]:
        """Values along x."""
        values = [p.x for p in self.points] + ([self.reference] if self.reference is not None else [])
        return ticks(min([0.0, *values]), max(values))

    @property
    def y_ticks(self) -> list[float]:
        """Values along y."""
        values = [p.y for p in self.points] + ([self.floor] if self.floor is not None else [])
        return ticks(min(values), max(values))

    def px(self, x: float) -> float:
        """Pixel of a value along x."""
        low, high = self.x_ticks[0], self.x_ticks[-1]
        return round(self.left + (x - low) / (high - low) * (self.right - self.left), 1)

    def py(self, y: float) -> float:
        """Pixel of a value along y."""
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return round(self.bottom - (y - low) / (high - low) * (self.bottom - self.top), 1)

    @property
    def front(self) -> list[Point]:
        """Points that no other one beats on both axes, from the cheapest."""
        sign_x, sign_y = (1 if self.lower_x else -1), (1 if self.higher_y else -1)
        best, found = -math.inf, []
        for point in sorted(self.points, key=lambda p: (p.x * sign_x, -p.y * sign_y)):
            if point.y * sign_y > best:
                best = point.y * sign_y
                found.append(point)
        return found

    @property
    def front_path(self) -> str:
        """The front as points of a polyline."""
        return " ".join(f"{self.px(p.x)},{self.py(p.y)}" for p in self.front)

    @property
    def marks(self) -> list[Mark]:
        """Points with labels that stand clear of each other where there is room."""
        dots = [(self.px(p.x), self.py(p.y)) for p in self.points]
        taken: list[tuple[float, float]] = []
        found = []
        for point, (x, y) in zip(self.points, dots):
            others = [d for d in dots if d != (x, y)]
            place = min(_PLACES, key=lambda p: self._crowding((x + p[0], y + p[1]), taken, others))
            label = (x + place[0], y + place[1])
            taken.append(label)
            found.append(Mark(point, x, y, *label))
        return found

    def _crowding(
        self, at: tuple[float, float], labels: Sequence[tuple[float, float]], dots: Sequence[tuple[float, float]]
    ) -> float:
        """How badly a label would stand there; equal places keep their order of preference."""
        wide, tall = _LABEL
        outside = not (self.left + 6 < at[0] < self.right - 4 and self.top + 5 < at[1] < self.bottom - 5)
        over = sum(abs(at[0] - x) < wide and abs(at[1] - y) < tall for x, y in labels)
        near = sum(abs(at[0] - x) < wide * 0.75 and abs(at[1] - y) < tall * 0.75 for x, y in dots)
        return 10 * outside + 4 * over + 3 * near


@dataclass(frozen=True)
class Bar:
    """One step of a timeline in pixels, its work over dense work, and whether it is dense."""

    step: int
    work: float
    x: float
    y: float
    width: float
    height: float
    dense: bool


def timeline(work_by_step: Sequence[tuple[int, float]], steps: int, width: float = 640.0) -> list[Bar]:
    """Bars of one configuration.

    Args:
        work_by_step: step and its work over dense work.
        steps: steps of the run, so that all timelines share one axis.
        width: of the chart.

    Raises:
        ValueError: ``steps`` is below 1.
    """
    if steps < 1:
        raise ValueError(f"a timeline needs at least one step, got {steps}")
    each = width / steps
    bars = []
    for step, work in work_by_step:
        tall = min(max(work, 0.0), _MOST) / _MOST * _BAR_HEIGHT
        wide = max(each - (1.5 if each > 5 else 0.4), 0.5)
        bars.append(
            Bar(
                step,
                work,
                round(step * each, 2),
                round(_BAR_HEIGHT - tall, 2),
                round(wide, 2),
                round(tall, 2),
                work > 0.999,
            )
        )
    return bars


#: Height of the line where a step costs as much as dense attention.
DENSE_LINE = round(_BAR_HEIGHT - _BAR_HEIGHT / _MOST, 2)
TIMELINE_HEIGHT = _BAR_HEIGHT
