"""How far sparse attention is from dense attention, on its own output and on its mask."""

from __future__ import annotations

from torch import Tensor

__all__ = ["cosine", "cosine_by_head", "recalled_mass", "relative_l1", "relative_l1_by_head", "rmse"]

_TINY = 1e-30


def _pair(output: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if output.shape != reference.shape:
        raise ValueError(f"outputs must have one shape, got {tuple(output.shape)} and {tuple(reference.shape)}")
    return output.detach().double(), reference.detach().double()


def relative_l1(output: Tensor, reference: Tensor) -> float:
    """Sum of absolute differences over the sum of absolute reference values (SpargeAttn's L1)."""
    a, b = _pair(output, reference)
    return float((a - b).abs().sum() / b.abs().sum().clamp(min=_TINY))


def cosine(output: Tensor, reference: Tensor) -> float:
    """Cosine similarity of the whole tensors."""
    a, b = _pair(output, reference)
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=_TINY))


def relative_l1_by_head(output: Tensor, reference: Tensor) -> Tensor:
    """:func:`relative_l1` of each head: ``[B, S, H, D]`` in, float64 ``[H]`` out."""
    a, b = _pair(output, reference)
    return (a - b).abs().sum((0, 1, 3)) / b.abs().sum((0, 1, 3)).clamp(min=_TINY)


def cosine_by_head(output: Tensor, reference: Tensor) -> Tensor:
    """:func:`cosine` of each head: ``[B, S, H, D]`` in, float64 ``[H]`` out."""
    a, b = _pair(output, reference)
    norms = a.square().sum((0, 1, 3)).sqrt() * b.square().sum((0, 1, 3)).sqrt()
    return (a * b).sum((0, 1, 3)) / norms.clamp(min=_TINY)


def rmse(output: Tensor, reference: Tensor) -> float:
    """Root of the mean squared difference."""
    a, b = _pair(output, reference)
    return float((a - b).square().mean().sqrt())


def recalled_mass(mass: Tensor, kept: Tensor) -> Tensor:
    """Share of the softmax mass that a mask keeps.

    Args:
        mass: ``[..., Qb, Kb]``, each row summing to 1 (:func:`dit_accel_kernels.block_mass`).
        kept: ``[..., Qb, Kb]``, non-zero where a block is computed.

    Returns:
        float32 ``[...]``, mean over the rows.
    """
    if mass.shape[-2:] != kept.shape[-2:]:
        raise ValueError(f"mass and kept must have one map size, got {tuple(mass.shape)} and {tuple(kept.shape)}")
    return (mass.float() * (kept != 0)).sum(-1).mean(-1)
