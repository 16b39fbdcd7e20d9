"""Skipped blocks enter as their mean key and value (Sol-Attn, arXiv 2607.24027)."""

from __future__ import annotations

from dit_accel.compensate._registry import COMPENSATIONS, Compensation


class _Mean(Compensation):
    pooled = True


@COMPENSATIONS.register("mean", paper="arXiv 2607.24027")
def mean() -> Compensation:
    """Each skipped block is one key in the same softmax: its mean, with weight ``count * exp(q . mean)``."""
    return _Mean()
