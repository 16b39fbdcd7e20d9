"""One attention call as ComfyUI's models make it, in any of its forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Call", "unwrapped"]

_NAMES = ("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")


def unwrapped(args: Sequence[Any]) -> tuple[Any, ...]:
    """Arguments with tensors in place of the containers that newer versions of ComfyUI use to free them early."""
    return tuple(a.take() if not isinstance(a, Tensor) and hasattr(a, "take") else a for a in args)


@dataclass(frozen=True)
class Call:
    """Arguments of ``optimized_attention``, by name.

    Attributes:
        q, k, v: ``[B, S, H D]``, or ``[B, H, S, D]`` with ``split``.
        heads: number of query heads.
        mask: see :func:`~dit_accel_patches.comfyui.masks.key_valid`.
        scale: factor of the scores, ``None`` for ``1 / sqrt(D)``.
        split: whether the heads have an axis of their own.
        keep: whether the result is wanted as ``[B, H, S, D]``.
        exact: whether the model asks for float32 inside.
        grouped: whether keys and values have fewer heads.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    mask: Tensor | None
    scale: float | None
    split: bool
    keep: bool
    exact: bool
    grouped: bool

    @classmethod
    def parse(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
        """Read a call ``(q, k, v[, heads[, mask, ...]], **kwargs)``; ``None`` if it has another form."""
        given = {**dict(zip(_NAMES, args)), **kwargs}
        q, k, v, heads = (given.get(name) for name in _NAMES[:4])
        if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor) and isinstance(heads, int)):
            return None
        split = bool(given.get("skip_reshape"))
        if q.ndim != (4 if split else 3) or q.dtype != k.dtype or q.dtype != v.dtype:
            return None
        precision = given.get("attn_precision")
        return cls(
            q,
            k,
            v,
            heads,
            given.get("mask"),
            given.get("scale"),
            split,
            bool(given.get("skip_output_reshape")),
            precision is not None and precision.itemsize > q.dtype.itemsize,
            bool(given.get("enable_gqa")),
        )

    @property
    def tokens(self) -> int:
        """Length of the query sequence."""
        return int(self.q.shape[2] if self.split else self.q.shape[1])

    def heads_last(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """q, k and v as ``[B, S, H, D]`` if this is self-attention of equal shapes; keys of groups are repeated."""
        if self.split:
            q, k, v = (x.transpose(1, 2) for x in (self.q, self.k, self.v))
        else:
            dim = self.q.shape[-1] // self.heads
            if any(x.shape[-1] % dim for x in (self.k, self.v)):
                return None
            q, k, v = (x.unflatten(-1, (-1, dim)) for x in (self.q, self.k, self.v))
        if self.grouped and k.shape[2] and q.shape[2] % k.shape[2] == 0:
            k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
        return (q, k, v) if q.shape == k.shape == v.shape else None

    def from_result(self, out: Tensor) -> Tensor:
        """What attention returned, as ``[B, S, H, D]``."""
        return out.transpose(1, 2) if self.keep else out.unflatten(-1, (self.heads, -1))

    def to_result(self, out: Tensor) -> Tensor:
        """``[B, S, H, D]`` as the model wants it."""
        return out.transpose(1, 2) if self.keep else out.flatten(2)
