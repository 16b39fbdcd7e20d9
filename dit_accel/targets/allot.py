"""Densities that reach an error with the least work, or the least error within a work: a Lagrangian over heads.

With the squared error ``e_i(d)`` of each head ``i`` at density ``d``, the cheapest way to a total error takes for every
head the density that minimises ``e_i(d) + m d`` with one multiplier ``m`` for all of them: there the error that one more
block removes is worth the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["FINE", "allot_error", "allot_work", "refine"]

#: Densities that can be allotted.
FINE = (*(round(0.01 * 1.08**i, 4) for i in range(60)), 1.0)
_MULTIPLIERS = 128
_TINY = 1e-20


@lru_cache(maxsize=64)
def _numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers on a device, copied there once: a copy from the host waits."""
    return torch.tensor(values, device=device)


def refine(measured: Sequence[float], error: Tensor, fine: Sequence[float] = FINE) -> Tensor:
    """Squared errors at further densities: the root is taken to be linear in the density, and 0 at density 1.

    Below the lowest measured density the error is that of the lowest plus what the first slope adds. Errors that rise with
    the density, as samples may, are levelled.

    Args:
        measured: rising densities, all below 1.
        error: squared relative errors ``[D, ...]`` at these.
        fine: rising densities to know it at.

    Returns:
        float32 ``[G, ...]``, falling along the first axis.

    Raises:
        ValueError: densities that do not rise, or another number of errors.
    """
    if list(measured) != sorted(set(measured)) or not measured[0] > 0 or not measured[-1] < 1:
        raise ValueError(f"measured densities must rise from above 0 to below 1, got {list(measured)}")
    if error.shape[0] != len(measured):
        raise ValueError(f"there must be an error for each of {len(measured)} densities, got {error.shape[0]}")
    root = error.float().clamp(min=0).sqrt().flip(0).cummax(0).values.flip(0)
    root = torch.cat([root, torch.zeros_like(root[:1])])
    xs, at = _numbers((*measured, 1.0), error.device), _numbers(tuple(fine), error.device)
    right = torch.searchsorted(xs, at).clamp(1, len(xs) - 1)
    place = ((at - xs[right - 1]) / (xs[right] - xs[right - 1])).view(-1, *[1] * (root.ndim - 1))
    found = root[right - 1] + (root[right] - root[right - 1]) * place
    return found.clamp(min=0).square()


def _choices(error: Tensor, weight: Tensor, work: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each multiplier, rising, the density index of each head, the summed error and the mean work.

    Args:
        error: ``[G, N]`` squared errors on the densities of :data:`FINE`.
        weight: ``[N]``, what a squared error of 1 of a head adds to the total.
        work: ``[N]``, weight of each head's density in the work; sums to 1.
    """
    fine = _numbers(FINE, error.device)
    loss = error * weight
    top = (loss.amax() / work.clamp(min=_TINY).amin()).clamp(min=_TINY).log10() + 3
    powers = torch.linspace(0, 1, _MULTIPLIERS, device=error.device)
    multipliers = 10 ** (top - 14 + 14 * powers)
    cost = loss[None] + multipliers[:, None, None] * (fine[:, None] * work)[None]
    index = cost.argmin(1)  # [M, N]
    total = loss.T.gather(1, index.T).sum(0)
    return index, total, (fine[index] * work).sum(-1)


def _normal(work: Tensor | None, like: Tensor) -> Tensor:
    work = torch.ones_like(like) if work is None else work.to(like)
    return work / work.sum().clamp(min=_TINY)


def allot_error(error: Tensor, weight: Tensor, target: float | Tensor, work: Tensor | None = None) -> Tensor:
    """The cheapest densities whose weighted squared errors add up to at most the square of ``target``.

    Everything stays on the device of ``error``.

    Args:
        error: float32 ``[G, N]`` from :func:`refine`, at the densities of :data:`FINE`.
        weight: float32 ``[N]``, what a squared error of 1 of each head adds to the total.
        target: the error to stay below; its square is compared.
        work: float32 ``[N]``, what a head's density costs; left out, all the same.

    Returns:
        float32 ``[N]`` densities.
    """
    index, total, _ = _choices(error, weight, _normal(work, weight))
    fits = total <= target**2
    # Multipliers rise, so errors do: the last that fits is the cheapest. Where none does, everything is kept.
    last = (fits.cumprod(0).sum() - 1).clamp(min=0)
    fine = _numbers(FINE, error.device)
    picked = fine[index.index_select(0, last[None])[0]]
    return torch.where(fits[0], picked, torch.ones_like(picked))


def allot_work(error: Tensor, weight: Tensor, budget: float, work: Tensor | None = None) -> Tensor:
    """The densities with the least weighted squared error whose mean, weighted by ``work``, is ``budget``.

    Args:
        error: float32 ``[G, N]`` from :func:`refine`.
        weight: float32 ``[N]``.
        budget: mean density, above 0 and at most 1.
        work: float32 ``[N]``, what a head's density costs; left out, all the same.

    Returns:
        float32 ``[N]`` densities; scaled at the end so that the mean is met up to the limits 0.01 and 1.

    Raises:
        ValueError: a budget out of range.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"the budget must be above 0 and at most 1, got {budget!r}")
    work = _normal(work, weight)
    index, _, spent = _choices(error, weight, work)
    fine = _numbers(FINE, error.device)
    nearest = (spent - budget).abs().argmin()
    picked = fine[index[nearest]]
    for _ in range(8):  # what stands at a limit cannot move, so that the rest moves more
        picked = (picked * (budget / (picked * work).sum())).clamp(FINE[0], 1.0)
    return picked
