"""MiniMax-H3: one packed sequence of text, references, sound and video, whose order comes as index tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from dit_accel.geometry import TokenGeometry
from dit_accel_patches.family import Family
from dit_accel_patches.readers import Call, along

__all__ = ["ADAPTER"]

# The pipeline packs once a run and passes the same tensors in every step.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _geometry(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    positions = call.tensor("position_ids")
    found = _known.get(positions)
    if found is None:
        found = _known[positions] = _read(positions, call.tensor("video_indices"))
    known: TokenGeometry | str = found
    return known


def _read(position_ids: Tensor, video_indices: Tensor) -> TokenGeometry | str:
    """The last block of video rows; references, sound and text stand around it."""
    positions, video = position_ids.detach().to("cpu"), video_indices.detach().to("cpu")
    if len(video) == 0:
        return "the sequence has no video tokens"
    breaks = (video.diff() != 1).nonzero()
    start = int(video[int(breaks[-1]) + 1]) if len(breaks) else int(video[0])
    stop = int(video[-1]) + 1
    grid = _grid(positions[start:stop])
    if grid is None:
        return "the video tokens are not in raster order"
    return TokenGeometry(grid, prefix=start, suffix=len(positions) - stop)


def _period(rows: Tensor, axis: int) -> int:
    """Rows until the coordinate of an axis begins again."""
    again = (rows[1:, axis] < rows[:-1, axis]).nonzero()
    return int(again[0]) + 1 if len(again) else len(rows)


def _grid(rows: Tensor) -> tuple[int, int, int] | None:
    """Frames, rows and columns of ``[S, 3]`` positions, ``None`` where they are no raster."""
    width, frame = _period(rows, 2), along(rows[:, 0])
    if frame % width or len(rows) % frame:
        return None
    grid = (len(rows) // frame, frame // width, width)
    table = rows.view(*grid, 3)
    ordered = (table[..., 0] == table[:, :1, :1, 0]) & (table[..., 1] == table[:1, :, :1, 1])
    same = ordered & (table[..., 2] == table[:1, :1, :, 2])
    rising = all(
        bool((torch.diff(axis) > 0).all()) for axis in (table[:, 0, 0, 0], table[0, :, 0, 1], table[0, 0, :, 2])
    )
    return grid if bool(same.all()) and rising else None


ADAPTER = Family(
    name="minimax_h3",
    models=("MiniMaxH3Transformer3DModel",),
    blocks=("transformer_blocks",),
    attention=("attn",),
    geometry=_geometry,
    note="MiniMax-H3 text, picture and reference to video and sound; the video rows are sparse, all others exact",
    layout="text, references, sound | video",
    dense="the token refiner of the text",
)
