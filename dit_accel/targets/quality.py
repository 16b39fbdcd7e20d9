"""From a PSNR to an error of attention: curves that were measured, and where."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["QualityCurve", "QualityPoint"]

_LEAST, _MOST = 1e-4, 0.9
#: dB per decade of error where only one point is known: a PSNR falls by 20 dB when all errors grow tenfold.
_SLOPE = -20.0


@dataclass(frozen=True)
class QualityPoint:
    """One measured setting.

    Attributes:
        error: relative L2 error of attention that was asked for.
        psnr: mean PSNR against dense over the prompts, dB.
        density: mean work over dense work of the whole run.
    """

    error: float
    psnr: float
    density: float

    def __post_init__(self) -> None:
        for name, value, most in (
            ("error", self.error, 1.0),
            ("psnr", self.psnr, 200.0),
            ("density", self.density, 4.0),
        ):
            ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= most
            if not ok:
                raise ValueError(f"{name} of a measured point must be above 0 and at most {most:g}, got {value!r}")


@dataclass(frozen=True)
class QualityCurve:
    """PSNR against dense by the error of attention, as measured.

    Attributes:
        points: by rising error.
        source: what it was measured on: model, size, steps, prompts, device.
    """

    points: tuple[QualityPoint, ...]
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", tuple(sorted(self.points, key=lambda p: p.error)))
        errors = [point.error for point in self.points]
        if not errors or len(set(errors)) < len(errors):
            raise ValueError(f"a curve needs points of different errors, got errors {errors}")

    def error_for(self, psnr: float) -> float:
        """The error at which the curve has a PSNR: linear in the logarithm, the last slope beyond the ends.

        Raises:
            ValueError: for a PSNR that is not between 5 and 100 dB.
        """
        if not isinstance(psnr, int | float) or isinstance(psnr, bool) or not 5 <= psnr <= 100:
            raise ValueError(f"target_psnr must be between 5 and 100 dB, got {psnr!r}")
        xs, ys = self._falling()
        index = next((i for i in range(1, len(xs)) if ys[i] <= psnr), len(xs) - 1)
        low = max(index - 1, 0)
        slope = (ys[index] - ys[low]) / (xs[index] - xs[low]) if index > low else _SLOPE
        slope = slope if slope < -1 else _SLOPE  # a flat end says nothing about what lies beyond
        found = xs[low] + (psnr - ys[low]) / slope
        return min(max(10**found, _LEAST), _MOST)

    def covers(self, psnr: float) -> bool:
        """Whether the PSNR lies within what was measured."""
        values = [point.psnr for point in self.points]
        return min(values) <= psnr <= max(values)

    def _falling(self) -> tuple[list[float], list[float]]:
        """Logarithms of errors and PSNR that falls with them: neighbours out of order are joined at their mean."""
        groups: list[tuple[list[float], list[float]]] = []
        for point in self.points:
            groups.append(([math.log10(point.error)], [point.psnr]))
            while len(groups) > 1 and _mean(groups[-1][1]) >= _mean(groups[-2][1]):
                xs, ys = groups.pop()
                groups[-1] = (groups[-1][0] + xs, groups[-1][1] + ys)
        return [_mean(xs) for xs, _ in groups], [_mean(ys) for _, ys in groups]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` is the inverse."""
        rows = [{"error": p.error, "psnr": p.psnr, "density": p.density} for p in self.points]
        return {"source": self.source, "points": rows}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QualityCurve:
        """Rebuild from :meth:`to_dict`.

        Raises:
            ValueError: if keys are missing or values are bad.
        """
        try:
            points = tuple(QualityPoint(**row) for row in data["points"])
            return cls(points, str(data["source"]))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"a quality curve has 'source' and 'points' of error, psnr and density: {error!r}"
            ) from None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
