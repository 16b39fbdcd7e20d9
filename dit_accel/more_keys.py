"""Keys beyond the model's own, always exact: attention over both, joined by their log-sum-exp.

DiTCtrl (arXiv 2412.18597) lets a prompt look at the keys and values of the prompt before it. Where these come behind the
layer's own, the plan covers the own keys, and the others are seen by every query.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dit_accel_kernels import dense_attention, lse_merge

__all__ = ["MoreKeys"]


@dataclass(frozen=True, eq=False)
class MoreKeys:
    """Keys and values behind those of the sequence.

    Attributes:
        key: ``[B, H, E, D]``.
        value: ``[B, H, E, D]``.
        key_valid: bool ``[B, E]``, or ``None``.
    """

    key: Tensor
    value: Tensor
    key_valid: Tensor | None

    @classmethod
    def split(
        cls, key: Tensor, value: Tensor, key_valid: Tensor | None, tokens: int
    ) -> tuple[Tensor, Tensor, Tensor | None, MoreKeys | None]:
        """Cut ``[B, H, S + E, D]`` behind the ``tokens`` of the sequence; nothing is left over where ``E`` is 0."""
        if key.shape[2] == tokens:
            return key, value, key_valid, None
        own = None if key_valid is None else key_valid[:, :tokens]
        rest = None if key_valid is None else key_valid[:, tokens:]
        return key[:, :, :tokens], value[:, :, :tokens], own, cls(key[:, :, tokens:], value[:, :, tokens:], rest)

    def join(self, query: Tensor, out: Tensor, lse: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        """Attention over own keys, ``[B, H, S, D]`` and float32 ``[B, H, S]``, becomes that over all."""
        found, found_lse = dense_attention(query, self.key, self.value, scale=scale, key_valid=self.key_valid)
        return lse_merge(out, lse, found, found_lse)

    def share(self, tokens: int) -> float:
        """Their share of the attention map of a sequence of ``tokens``."""
        return self.key.shape[2] / (tokens + self.key.shape[2])
