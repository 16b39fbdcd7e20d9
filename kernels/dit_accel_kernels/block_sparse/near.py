"""Windows in few bits, where the codes of every tile of keys lie close together, as those of bricks do.

A key sets one bit for each axis, among ten codes from the least of its tile on; a query has the bits of all codes that it
sees, found once a tile and row. A key is inside the window iff all its bits are among them, which takes two operations a
logit instead of seven. A key that everybody sees sets none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakIdKeyDictionary

from ..types import TokenWindows

__all__ = ["PackedWindows", "packed_windows", "window_bits"]

_CODES = 10  # of each axis: three times as many bits fit into 32
_LIMIT = 1023  # codes that are packed, three in 32 bits, are less, counted from the least one
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()
_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True)
class PackedWindows:
    """Windows in four words: three axes of ten bits each.

    Attributes:
        q_lo: int32 ``[Sq]``.
        q_hi: int32 ``[Sq]``.
        k_bits: int32 ``[Sk]``, as :func:`window_bits` has them.
        k_base: int32 ``[ceil(Sk / tile)]``, the least codes of each tile.
    """

    q_lo: Tensor
    q_hi: Tensor
    k_bits: Tensor
    k_base: Tensor


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


def packed_windows(windows: TokenWindows, tile: int) -> PackedWindows | None:
    """The same for kernels that keep the bounds of queries in registers; ``None`` also where codes are 1023 or more apart.

    Codes and bounds are counted from the least code of an axis, so that negative ones fit as well.

    Found once for each tensor of lower bounds, as long as that lives and the others are the same.

    Args:
        windows: intervals of the queries and codes of the keys.
        tile: keys of a tile.
    """
    found = window_bits(windows.k_code, tile)
    if found is None:
        return None
    tensors = (windows.q_lo, windows.q_hi, windows.k_code)
    key = (tile, *((id(x), 0 if x.is_inference() else x._version) for x in tensors))
    answers = _packed.setdefault(windows.q_lo, {})
    if key not in answers:
        if windows.k_code.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        code = windows.k_code
        free = code[:1] < 0
        least = code.masked_fill(free, torch.iinfo(torch.int32).max).amin(1, keepdim=True)
        least = least.masked_fill(free.all(), 0)
        fits = bool((code.masked_fill(free, 0) - least < _LIMIT).all())
        lo, hi = (_pack((x - least).clamp(0, _LIMIT)) for x in tensors[:2])
        base = _pack((found[1] - least).clamp_min(0))
        # The tensors stay, lest another one get the id of one of them.
        answers[key] = (PackedWindows(lo, hi, found[0], base) if fits else None, tensors[1:])
    packed: PackedWindows | None = answers[key][0]
    return packed


def _pack(x: Tensor) -> Tensor:
    return (x[0] | (x[1] << 10) | (x[2] << 20)).to(torch.int32).contiguous()


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
