"""Number formats of sparse attention: what :attr:`dit_accel.Method.precision` names, and the call that carries it out.

How ``"auto"`` picks a format for each head is in :mod:`dit_accel.precision.by_head`.
"""

from __future__ import annotations

from dit_accel.precision.attention import quantized_attention, serving
from dit_accel.precision.rule import PrecisionRule, parse_precision

__all__ = ["PrecisionRule", "parse_precision", "quantized_attention", "serving"]
