"""Expected errors with fine mass in Triton: moments of blocks, means of runs, mass of their map, and the map of errors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...spread.triton.moments import moments_triton
from .errors import errors_triton
from .mass import fine_mass_triton
from .runs import runs_triton

__all__ = ["fine_spread_scores_triton"]


def fine_spread_scores_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: int,
    block_q: int,
    block_k: int,
    scale: float,
    orders: Sequence[Tensor | None],
    key_valid: Tensor | None,
) -> Tensor:
    """See :func:`dit_accel_kernels.fine_spread.fine_spread_scores`."""
    with torch.cuda.device_of(query):
        runs = runs_triton(query, key, tokens, orders, key_valid)
        mass = fine_mass_triton(runs, tokens, query.shape[2], key.shape[2], block_q, block_k, scale)
        moments = moments_triton(query, key, value, block_q, block_k, orders, None, key_valid)
        return errors_triton(mass, moments, scale)
