"""A picture of what was computed: layers and heads above, steps below. Drawn with torch alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel.ledger import RunStatus

__all__ = ["density_picture"]

_CELL = 12
_BAR_HEIGHT = 96
_GAP = 12
_WIDTH = 512
_BACKGROUND = (0.13, 0.13, 0.15)
# From nothing computed to everything: dark blue, teal, yellow.
_COLOURS = ((0.16, 0.11, 0.35), (0.12, 0.57, 0.55), (0.99, 0.91, 0.15))


def density_picture(statuses: Sequence[RunStatus]) -> Tensor:
    """Picture ``[1, H, W, 3]`` in 0 to 1.

    For each status a map with a row for each layer and a column for each head, whose colour is the share of the blocks
    that was computed exactly (dark nothing, yellow all, as for dense layers); below it a bar for each step, whose height
    is the work of the step over that of a dense one.
    """
    parts = [part for status in statuses for part in (_heads(status), _steps(status)) if part is not None]
    if not parts:
        return torch.tensor(_BACKGROUND).expand(1, _BAR_HEIGHT, _WIDTH, 3).clone()
    width = max(_WIDTH, *(part.shape[1] for part in parts)) + 2 * _GAP
    height = sum(part.shape[0] + _GAP for part in parts) + _GAP
    canvas = torch.tensor(_BACKGROUND).expand(height, width, 3).clone()
    top = _GAP
    for part in parts:
        canvas[top : top + part.shape[0], _GAP : _GAP + part.shape[1]] = part
        top += part.shape[0] + _GAP
    return canvas[None]


def _heads(status: RunStatus) -> Tensor | None:
    layers = [layer for layer in status.layers if layer.sparse or layer.dense]
    heads = max((len(layer.head_density) for layer in layers), default=0)
    if not heads:
        return None
    shares = torch.ones(len(layers), heads)
    for row, layer in enumerate(layers):
        if layer.head_density:
            shares[row] = torch.tensor(layer.head_density)
    return _enlarged(_coloured(shares), _CELL, max(_CELL, _WIDTH // heads))


def _steps(status: RunStatus) -> Tensor | None:
    if not status.density_by_step:
        return None
    steps = max(status.density_by_step) + 1
    shares = torch.zeros(steps)
    for step, share in status.density_by_step.items():
        shares[step] = min(share, 1.0)
    rows = torch.arange(_BAR_HEIGHT, 0, -1)[:, None] <= (shares * _BAR_HEIGHT).round()[None]
    bars = torch.where(rows[..., None], _coloured(shares)[None], torch.tensor(_BACKGROUND) * 1.6)
    return _enlarged(bars, 1, max(2, _WIDTH // steps))


def _coloured(shares: Tensor) -> Tensor:
    """Colour of shares in 0 to 1, ``[..., 3]``."""
    table = torch.tensor(_COLOURS)
    place = shares.clamp(0, 1) * (len(_COLOURS) - 1)
    low = place.floor().long().clamp(max=len(_COLOURS) - 2)
    part = (place - low)[..., None]
    return table[low] * (1 - part) + table[low + 1] * part


def _enlarged(picture: Tensor, height: int, width: int) -> Tensor:
    return picture.repeat_interleave(height, 0).repeat_interleave(width, 1)
