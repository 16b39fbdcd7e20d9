"""Selection where each head has a density of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dit_accel._specs import parse_spec
from dit_accel.selection import Forced, select
from dit_accel.selection._ranked import budget, keep_ranked, with_best

__all__ = ["chooses_by_head", "select_by_head"]


def chooses_by_head(rule: str) -> bool:
    """Whether a rule gives every head the same share, so that a density for each head says more.

    Others spread one budget over the heads of a layer by themselves, by their scores or by one strength for all.
    """
    return parse_spec(rule).name in ("top_k", "top_k_head")


def select_by_head(
    rule: str, scores: Tensor, density: Tensor, forced: Forced, *, insist: Tensor | None = None
) -> tuple[Tensor, int | None]:
    """Choose blocks with one density for each head, or one for the layer.

    ``top_k``, ``top_k_head`` and ``top_k_layer`` do so on the device. For other rules the
    heads that share a density are chosen together, as :func:`dit_accel.selection.select` does it, which reads densities
    that lie on a device once.

    Args:
        rule: spec of a rule in :data:`dit_accel.selection.SELECTIONS`.
        scores: float32 ``[B, H, Qb, Kb]``. Values that are not finite count as the least.
        density: float32 ``[H]``, share of each head's map, or ``[1]`` for all of them together, above 0 and at most 1; on
            the CPU or the device of the scores.
        forced: blocks that are exact whatever their score.
        insist: bool ``[B|1, H|1, Qb, Kb]``, further blocks that are exact.

    Returns:
        uint8 levels ``[B, H, Qb, Kb]``, and an upper bound of the chosen blocks if the host knows one.

    Raises:
        ValueError: if there is neither one density nor one for each head.
    """
    heads = scores.shape[1]
    if density.ndim != 1 or len(density) not in (1, heads):
        raise ValueError(f"there must be one density for each of {heads} heads, got shape {list(density.shape)}")
    known = density.tolist() if density.device.type == "cpu" else None
    if known is not None and len(set(known)) == 1:
        return select(rule, scores, known[0], forced, insist=insist)
    spec = parse_spec(rule)
    whole = spec.name == "top_k_layer"  # its blocks are those of all heads
    if (
        insist is None
        and not spec.args
        and not spec.kwargs
        and spec.name in _ON_DEVICE
        and (len(density) == 1 or not whole)
    ):
        return _on_device(spec.name, scores, density, known, forced)
    known = density.tolist() if known is None else known
    if len(known) == 1:
        return select(rule, scores, known[0], forced, insist=insist)
    return _grouped(rule, scores, known, forced, insist)


def _counts(density: Tensor, blocks: int, device: torch.device) -> Tensor:
    """How many of ``blocks`` each head keeps, int64 ``[H]``, at least one."""
    share = density.to(device, non_blocking=True)
    return (share * blocks).round().clamp(min=1, max=blocks).long()


def _top_k(scores: Tensor, density: Tensor) -> Tensor:
    return keep_ranked(scores, _counts(density, scores.shape[-1], scores.device)[:, None, None])


def _top_k_head(scores: Tensor, density: Tensor) -> Tensor:
    flat = scores.flatten(2)
    kept = keep_ranked(flat, _counts(density, flat.shape[-1], scores.device)[:, None])
    return with_best(kept.view_as(scores), scores)


def _top_k_layer(scores: Tensor, density: Tensor) -> Tensor:
    flat = scores.flatten(1)
    kept = keep_ranked(flat, _counts(density, flat.shape[-1], scores.device))
    return with_best(kept.view_as(scores), scores)


_ON_DEVICE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "top_k": _top_k,
    "top_k_head": _top_k_head,
    "top_k_layer": _top_k_layer,
}


def _on_device(
    name: str, scores: Tensor, density: Tensor, known: list[float] | None, forced: Forced
) -> tuple[Tensor, int | None]:
    scores = torch.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=0.0).masked_fill(forced.cols, torch.inf)
    levels = _ON_DEVICE[name](scores, density).to(torch.uint8)
    levels = levels.masked_fill(forced.cols | forced.rows[:, None], 1)
    if known is None:
        return levels, None
    batch, heads, rows, cols = scores.shape
    own = sum(budget(share, cols) * rows if name == "top_k" else budget(share, rows * cols) + rows for share in known)
    # Python's and torch's rounding agree, but for halves of float32; one block a row and head pays for those.
    bound = batch * (own + heads * (rows + rows * forced.col_count + cols * forced.row_count))
    return levels, min(bound, levels.numel())


def _grouped(
    rule: str, scores: Tensor, density: list[float], forced: Forced, insist: Tensor | None
) -> tuple[Tensor, int | None]:
    levels = torch.zeros_like(scores, dtype=torch.uint8)
    total: int | None = 0
    for share in sorted(set(density)):
        heads = [head for head, own in enumerate(density) if own == share]
        part = insist if insist is None or insist.shape[1] == 1 else insist[:, heads]
        found, bound = select(rule, scores[:, heads], share, forced, insist=part)
        levels[:, heads] = found
        total = None if total is None or bound is None else total + bound
    return levels, total
