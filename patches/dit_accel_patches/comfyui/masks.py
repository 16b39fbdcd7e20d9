"""Attention masks of ComfyUI's models as the one kind that the kernels take: which keys are seen."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["key_valid"]

# Models write "masked" as the largest negative number of some type, half of it or minus infinity.
_MASKED = -1e4


def key_valid(mask: Tensor, batch: int, tokens: int) -> Tensor | str | None:
    """Turn a mask into bool ``[B, S]``; ``None`` if every key is seen, a reason if keys alone cannot say it.

    Looks at the values, which waits for the device; callers keep the result for a forward call.

    Args:
        mask: bool (true is seen) or added to the scores: ``[Sq, S]``, ``[B, Sq, S]`` or ``[B, H, Sq, S]``, each axis but
            the last also of length 1.
        batch: rows of the batch.
        tokens: length of the sequence.
    """
    if mask.ndim not in (2, 3, 4) or mask.shape[-1] != tokens:
        return f"the mask has shape {tuple(mask.shape)}, expected [..., {tokens}]"
    whole = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape)) if mask.ndim == 2 else mask
    whole = whole.unsqueeze(1) if whole.ndim == 3 else whole
    if whole.shape[0] not in (1, batch):
        return f"the mask is for a batch of {whole.shape[0]}, the call has {batch}"
    for axis, name in ((1, "head"), (2, "query")):
        if whole.shape[axis] > 1 and whole.stride(axis) != 0:
            return f"the mask differs from {name} to {name}"
    keys = whole[:, 0, 0, :]
    if keys.dtype != torch.bool:
        seen = keys > _MASKED
        if bool((seen & (keys != 0)).any()):
            return "the mask weighs keys instead of hiding them"
        keys = seen
    if bool(keys.all()):
        return None
    return keys.expand(batch, tokens)
