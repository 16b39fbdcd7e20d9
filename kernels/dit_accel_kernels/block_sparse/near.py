"""Windows in few bits, where the codes of every tile of keys lie close together, as those of bricks do.

A key sets one bit for each axis, among ten codes from the least of its tile on; a query has the bits of all codes that it
sees, found once a tile and row. A key is inside the window iff all its bits are among them, which takes two operations a
logit instead of seven. A key that everybody sees sets none.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["window_bits"]

_CODES = 10  # of each axis: three times as many bits fit into 32
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def window_bits(k_code: Tensor, tile: int) -> tuple[Tensor, Tensor] | None:
    """Bits of each key and base of each tile, or ``None`` where the codes of some tile are too far apart.

    Which it is is read on the host once for each tensor of codes, and the answer kept as long as that lives: codes follow
    from the geometry alone. While a CUDA graph is captured an unknown one counts as too far, which is slower and right.

    Args:
        k_code: int32 ``[3, Sk]``, see :class:`~dit_accel_kernels.types.TokenWindows`.
        tile: keys of a tile.

    Returns:
        int32 ``[Sk]`` and int32 ``[3, ceil(Sk / tile)]``.
    """
    key = (tile, 0 if k_code.is_inference() else k_code._version)  # inference tensors have no version
    answers = _known.setdefault(k_code, {})
    if key not in answers:
        if k_code.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        bits, base, near = _find(k_code, tile)
        answers[key] = (bits, base) if bool(near) else None
    found: tuple[Tensor, Tensor] | None = answers[key]
    return found


def _find(k_code: Tensor, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    keys = k_code.shape[1]
    count = -(-keys // tile)
    tiles = pad(k_code, (0, count * tile - keys), value=-1).view(3, count, tile)
    free = tiles[:1] < 0
    base = tiles.masked_fill(free, torch.iinfo(torch.int32).max).amin(2)
    base = base.masked_fill(free.all(2), 0)
    offset = tiles - base[..., None]
    near = (free | (offset < _CODES)).all()
    shift = offset.clamp(0, _CODES - 1) + torch.arange(3, device=k_code.device)[:, None, None] * _CODES
    bits = (
        torch.ones_like(tiles)
        .bitwise_left_shift(shift.to(torch.int32))
        .sum(0, dtype=torch.int32)
        .masked_fill(free[0], 0)
    )
    return bits.view(-1)[:keys].contiguous(), base.contiguous(), near
