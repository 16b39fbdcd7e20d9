"""All blocks whose weight is large against an anchor (SALE, arXiv 2505.24179)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_accel.selection._ranked import with_best
from dit_accel.selection._registry import SELECTIONS, Forced, Rule


@SELECTIONS.register("relative", paper="arXiv 2505.24179")
def relative(scores: Tensor, forced: Forced, tau: float | None = None) -> Rule:
    """Blocks whose score, a natural logarithm, is above ``log tau``, and the best of each row.

    One threshold serves all heads, since scores are relative to each query's own anchor.

    Raises:
        ValueError: if ``tau`` is not positive.
    """
    if tau is not None and not tau > 0:
        raise ValueError(f"tau must be positive, got {tau!r}; a head that is to stay dense has tau near 0")

    def keep(strength: Tensor) -> Tensor:
        return with_best(scores > strength, scores).to(torch.uint8)

    finite = scores.where(torch.isfinite(scores), 0)
    # The least score must be kept at the strongest end, whose comparison is strict.
    return Rule(keep, low=finite.amax(), high=finite.amin() - 1, strength=None if tau is None else math.log(tau))
