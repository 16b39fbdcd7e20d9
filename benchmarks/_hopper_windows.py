"""Token windows on HunyuanVideo's grid: each plan compared with the window spelled out, then timed beside dense."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from _turns import CUDNN, Row, dense, in_turns, trust
from torch import Tensor

from dit_accel_kernels.lists import lists_from_levels
from dit_accel_kernels.types import BlockLists, TokenOrder

# Stride, brick, and tokens of the blocks of queries and keys.
WINDOW_PLANS: dict[str, tuple[Any, tuple[int, int, int], int, int]] = {
    "GNA stride 16x8x8": ((16, 8, 8), (2, 8, 8), 128, 128),
    "NA, bricks 8x4x4": (1, (8, 4, 4), 128, 128),
    "NA, bricks 8x4x4 and halves": (1, (8, 4, 4), 128, 64),
    "NA, bricks 4x4x4": (1, (4, 4, 4), 128, 64),
    "NA, Triton, 4x4x4": (1, (4, 4, 4), 64, 64),
}


def window_cases(rounds: int) -> list[Row]:
    """Windows of 18 x 24 x 24 on HunyuanVideo's grid from natural order and back, permuting k and v included.

    A stride of 16 x 8 x 8 splits no brick of 2 x 8 x 8; without a stride bricks are split. Rates count pairs in the window.
    """
    return in_turns("30x48x80 H24 d128", "window 0.09", window_calls((30, 48, 80), (18, 24, 24), 24), rounds)


def window_calls(
    grid: tuple[int, int, int], window: tuple[int, int, int], heads: int, only: str | None = None
) -> dict[str, tuple[Callable[[], Any], float]]:
    """Dense attention and each of ``WINDOW_PLANS`` with its number of operations, once its rows have been compared."""
    from dit_accel.geometry import TokenGeometry
    from dit_accel.order.brick import brick
    from dit_accel.windows import WindowSpec, token_windows, window_levels
    from dit_accel_kernels import block_sparse_attention, permute_tokens

    dim = 128
    trust(dim)
    geometry = TokenGeometry(grid)
    tokens = geometry.tokens
    q, k, v = (torch.randn(1, tokens, heads, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in "qkv")
    pairs = 4.0 * heads * dim * tokens * math.prod(window)
    calls: dict[str, tuple[Callable[[], Any], float]] = {}
    if only is None:
        calls[CUDNN] = (partial(dense, q, k, v), 4.0 * heads * dim * tokens * tokens)
    for name, (stride, size, block_q, block_k) in WINDOW_PLANS.items():
        if only not in (None, name):
            continue
        spec, index = WindowSpec(window, stride), brick(grid, size)
        levels = window_levels(geometry, spec, index, block_q, block_k).cuda()
        lists, windows = lists_from_levels(levels, block_q, block_k), token_windows(geometry, spec, index)
        whole = not bool((levels == 255).any())
        lists = replace(lists, partial=None) if whole else lists
        order = TokenOrder(index.int().cuda()[None], torch.zeros(heads, dtype=torch.int32, device="cuda"))
        more = {} if whole else {"windows": type(windows)(*(x.cuda() for x in vars(windows).values()))}
        visited = (levels != 0).float().mean().item()
        sys.stdout.write(
            f"{name}: visits {visited:.4f}, partial {(levels == 255).float().mean().item() / visited:.3f}\n"
        )

        def call(lists: BlockLists = lists, order: TokenOrder = order, more: dict[str, Any] = more) -> Any:
            moved_k, moved_v = permute_tokens(k, order), permute_tokens(v, order)
            return block_sparse_attention(q, moved_k, moved_v, lists, order=order, **more)

        check_windows(q, k, v, call(), spec, geometry)
        calls[name] = (call, pairs)
    return calls


def check_windows(q: Tensor, k: Tensor, v: Tensor, out: Tensor, spec: Any, geometry: Any) -> None:
    """Compare some rows with the window spelled out.

    Raises:
        RuntimeError: they differ.
    """
    from dit_accel.windows import token_windows

    windows = token_windows(geometry, spec)
    rows = torch.randint(0, geometry.tokens, (40,))
    lo, hi, code = windows.q_lo[:, rows, None], windows.q_hi[:, rows, None], windows.k_code[:, None]
    seen = ((lo <= code) & (code < hi)).all(0).cuda()
    picked = rows.cuda()
    logits = (q[0][:, picked].float() @ k[0].float().mT * q.shape[3] ** -0.5).masked_fill(~seen, -torch.inf)
    want = logits.softmax(-1) @ v[0].float()
    error = ((out[0][:, picked].float() - want).norm() / want.norm()).item()
    if not error < 8e-3:
        raise RuntimeError(f"windows {spec}: relative error {error:.3g}")


def warm_windows(name: str) -> int:
    """Compile what a plan with windows needs, on a small grid, and compare some rows with the window spelled out."""
    calls = window_calls((32, 32, 32), (18, 24, 24), 3, only=name)
    sys.stdout.write(f"{len(calls)} windows right\n")
    return int(not calls)
