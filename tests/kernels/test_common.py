"""What all operators share."""

from __future__ import annotations

import pytest

from dit_accel_kernels._common import split_head_dim


@pytest.mark.parametrize(
    ("dim", "parts"),
    [
        (8, (16, 0)), (16, (16, 0)), (24, (32, 0)), (40, (32, 16)), (52, (64, 0)), (64, (64, 0)), (72, (64, 16)),
        (80, (64, 16)), (96, (64, 32)), (112, (128, 0)), (128, (128, 0)), (160, (128, 32)), (256, (256, 0)),
    ],
)  # fmt: skip
def test_head_sizes_are_covered_by_two_powers_of_two(dim: int, parts: tuple[int, int]) -> None:
    assert split_head_dim(dim) == parts
    assert sum(parts) >= dim
