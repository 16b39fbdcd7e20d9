"""Copies between layouts."""

from __future__ import annotations

import pytest
import torch

from dit_accel.copies import in_one_piece


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.bool])
@pytest.mark.parametrize("dim", [128, 12, 8, 6, 1])
def test_copies_in_wide_steps_move_the_same_bits(dtype: torch.dtype, dim: int) -> None:
    x = torch.randn(2, 30, 6, dim).to(dtype)
    views = (
        x,
        x.unflatten(2, (2, 3)).permute(2, 1, 0, 3, 4),
        x[:, 3:].transpose(0, 1),
        x[..., dim // 2 :].transpose(0, 1),
        x.transpose(2, 3),
        x[:, :0].transpose(0, 1),
        x[:1].expand(3, -1, -1, -1).transpose(0, 1),
    )
    for view in views:
        found = in_one_piece(view)
        assert found.is_contiguous()
        assert found.dtype == dtype
        assert torch.equal(found, view)
