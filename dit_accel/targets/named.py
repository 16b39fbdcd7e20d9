"""Targets by name, and which error of attention stands for a PSNR where no profile says it."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import NamedTuple

from dit_accel._specs import parse_spec
from dit_accel.targets.quality import QualityCurve

__all__ = ["QUALITIES", "Target", "parse_target", "stock_curve"]

#: PSNR against dense in dB that each named quality asks for.
QUALITIES = {"high": 40.0, "balanced": 35.0, "fast": 30.0}

_KINDS = {"psnr": (5.0, 100.0), "error": (0.0, 1.0), "density": (0.0, 1.0)}


class Target(NamedTuple):
    """What a run is to reach.

    Attributes:
        kind: ``"psnr"`` against dense in dB, ``"error"``, the relative L2 error of attention, or ``"density"``, the mean
            share of the map on sparse steps.
        value: how much.
    """

    kind: str
    value: float

    def __str__(self) -> str:
        return f"{self.kind}:{self.value:g}"


def parse_target(text: str | Target) -> Target:
    """Read ``"psnr:35"``, ``"error:0.05"``, ``"density:0.3"``, or a name of :data:`QUALITIES`.

    Raises:
        ValueError: for anything else, or a value out of range.
    """
    if isinstance(text, Target):
        kind, value = text
    elif isinstance(text, str) and text in QUALITIES:
        return Target("psnr", QUALITIES[text])
    else:
        kind, value = _parsed(text)
    low, high = _KINDS.get(kind, (1.0, 0.0))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind not in _KINDS or not number or not low < value <= high:
        raise ValueError(_expected(text))
    return Target(kind, float(value))


def _parsed(text: object) -> tuple[str, float]:
    if not isinstance(text, str):
        raise ValueError(_expected(text))
    try:
        spec = parse_spec(text)
    except ValueError:
        raise ValueError(_expected(text)) from None
    if len(spec.args) != 1 or spec.kwargs or not isinstance(spec.args[0], int | float):
        raise ValueError(_expected(text))
    return spec.name, spec.args[0]


def _expected(got: object) -> str:
    names = ", ".join(map(repr, QUALITIES))
    return (
        "a target is 'psnr:DB' (above 5 dB), 'error:SHARE' or 'density:SHARE' (above 0, at most 1), or one of "
        f"{names}, got {got!r}"
    )


@cache
def _stock() -> dict[str, QualityCurve]:
    text = resources.files(__package__).joinpath("stock.json").read_text(encoding="utf-8")
    return {model: QualityCurve.from_dict(data) for model, data in json.loads(text).items()}


def stock_curve(model: str) -> tuple[QualityCurve, str | None]:
    """The curve that ships for a class of transformers, and a warning where it stands in for one that was not measured.

    Only small models could be measured; a calibration of the model itself says more.
    """
    known = _stock()
    if model in known:
        return known[model], None
    other, curve = next(iter(known.items()))
    return curve, (
        f"no PSNR was measured on a {model}; the curve of {other} ({curve.source}) stands in, so that the PSNR may be "
        "another than asked for. dit_accel.calibrate(pipe, prompts, target='psnr:...') measures it"
    )
