"""What the precision slot of a method says: one number format, or a choice by measured error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from dit_accel._specs import Spec, parse_spec
from dit_accel_kernels.quantize import PRECISIONS, Precision

__all__ = ["PrecisionRule", "parse_precision"]

_WIDE = "bf16"
_AUTO = "auto"
#: What ``"auto"`` tries, the first that a fast kernel serves here.
_CANDIDATES = ("int8_fp8", "int8")
#: Relative L2 error of a head's output beyond which ``"auto"`` leaves it in 16 bit.
_MAX_ERROR = 0.05
_FLAGS = ("rotate", "smooth")


@dataclass(frozen=True)
class PrecisionRule:
    """A parsed precision slot.

    Attributes:
        text: as it was written.
        fixed: the format of all heads, ``None`` for 16 bit and for ``"auto"``.
        candidates: names and formats that ``"auto"`` tries in turn; empty otherwise.
        max_error: relative L2 error above which ``"auto"`` leaves a head in 16 bit.
    """

    text: str
    fixed: Precision | None = None
    candidates: tuple[tuple[str, Precision], ...] = ()
    max_error: float = _MAX_ERROR

    @property
    def wide(self) -> bool:
        """Whether all is computed in 16 bit, as without the slot."""
        return self.fixed is None and not self.candidates


@lru_cache(maxsize=64)
def parse_precision(text: str) -> PrecisionRule:
    """Parse ``"bf16"``, a name such as ``"int8"`` or ``"int8_fp8:rotate=true"``, or ``"auto"``.

    Names are those of :data:`dit_accel_kernels.quantize.PRECISIONS`; they take ``rotate`` and ``smooth``. ``"auto"`` takes
    a name to try and the error that a head may have: ``"auto:int8,error=0.03"``.

    Raises:
        ValueError: an unknown name or a bad value.
    """
    if not isinstance(text, str):
        raise ValueError(f"precision must be {_expected()}, got {text!r}")
    spec = parse_spec(text)
    if spec.name == _WIDE and not (spec.args or spec.kwargs):
        return PrecisionRule(text)
    if spec.name in PRECISIONS and not spec.args and set(spec.kwargs) <= set(_FLAGS):
        return PrecisionRule(text, _format(spec.name, spec))
    if spec.name == _AUTO and len(spec.args) <= 1 and set(spec.kwargs) <= {*_FLAGS, "error"}:
        names = tuple(str(name) for name in spec.args) or _CANDIDATES
        error = spec.kwargs.get("error", _MAX_ERROR)
        ok = isinstance(error, int | float) and not isinstance(error, bool) and 0 < error < 1
        if ok and all(name in PRECISIONS for name in names):
            assert isinstance(error, int | float)
            return PrecisionRule(text, None, tuple((name, _format(name, spec)) for name in names), float(error))
    raise ValueError(f"precision must be {_expected()}, got {text!r}")


def _format(name: str, spec: Spec) -> Precision:
    known = PRECISIONS[name]
    rotate, smooth = spec.kwargs.get("rotate", known.rotate), spec.kwargs.get("smooth", known.smooth_k)
    if not (isinstance(rotate, bool) and isinstance(smooth, bool)):
        raise ValueError(f"precision: rotate and smooth must be true or false, got '{spec}'")
    return replace(known, rotate=rotate, smooth_k=smooth)


def _expected() -> str:
    known = ", ".join(map(repr, (_WIDE, *PRECISIONS, _AUTO)))
    return f"one of {known}, with rotate=, smooth= (and error= for 'auto', between 0 and 1) if need be"
