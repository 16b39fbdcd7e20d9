"""Which queries a block mass looks at and what is added to their logits, in one launch in front of the Hopper kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import blocks
from .._launch import launch
from ..aot_spec import AotSpec

__all__ = ["AOT_SPECS", "mass_rows"]

_SPAN = 512  # rows of a program


# Counts are not specialised: another number of tokens must not compile another kernel.
@triton.jit(do_not_specialize=["queries", "all_rows"])
def mass_rows_kernel(
    LSE, ROWS, TABLE, HEAD, TOKEN, SHIFT, queries, all_rows,
    EACH: tl.constexpr, STEP: tl.constexpr, SPAN: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """One program: SPAN rows of one head, of entries of EACH."""
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_map = i_b * tl.num_programs(1) + i_h
    row = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    here = row < all_rows
    entry = row // EACH
    if HAS_ROWS:
        entry = tl.load(ROWS + entry, mask=here, other=0).to(tl.int32)
    position = (entry * EACH + row % EACH) * STEP
    inside = here & (position < queries)
    token = tl.minimum(position, queries - 1)
    if HAS_ORDER:
        token = tl.load(TABLE + tl.load(HEAD + i_h).to(tl.int64) * queries + token, mask=inside, other=0)
    b_lse = tl.load(LSE + i_map * queries + token, mask=inside, other=float("-inf"))
    # A row that sees no key has lse = -inf; it says nothing about where the mass is. NaN is left out as well.
    counted = inside & (b_lse > float("-inf"))
    count = tl.sum(tl.reshape(counted.to(tl.float32), SPAN // EACH, EACH), 1)
    b_count = tl.reshape(tl.broadcast_to(tl.log2(tl.maximum(count, 1.0))[:, None], SPAN // EACH, EACH), SPAN)
    b_shift = tl.where(counted, b_lse * -1.4426950408889634 - b_count, float("-inf"))
    tl.store(SHIFT + i_map * all_rows + row, b_shift, mask=here)
    if HAS_ORDER:
        tl.store(TOKEN + i_h * all_rows + row, token, mask=here & (i_b == 0))
    else:
        tl.store(TOKEN + row, token, mask=here & (i_map == 0))


def mass_rows(
    lse: Tensor, block_q: int, rows: Tensor | None, table: Tensor | None, head: Tensor | None, step: int
) -> tuple[Tensor, Tensor]:
    """Queries to look at, and what is added to their logits.

    Args:
        lse: float32 ``[B, H, S]``.
        block_q: queries of an entry, a power of two of at most 512.
        rows: integers ``[R]``, the entries; ``None`` for all.
        table: int32 ``[N, S]`` or ``None``, as in ``TokenOrder``.
        head: int32 ``[H]`` or ``None``, as in ``TokenOrder``.
        step: distance of the queries; an entry stands for ``block_q * step`` of them.

    Returns:
        int32 ``[H|1, R * block_q]``, tokens, and float32 ``[B, H, R * block_q]`` in units of ``log2``: minus the
        log-sum-exp, minus ``log2`` of the rows of the entry that count; minus infinity for a row that does not.
    """
    batch, heads, queries = lse.shape
    all_rows = (blocks(queries, block_q * step) if rows is None else rows.shape[0]) * block_q
    lse = lse.contiguous()
    token = torch.empty(1 if table is None else heads, all_rows, dtype=torch.int32, device=lse.device)
    shift = torch.empty(batch, heads, all_rows, dtype=torch.float32, device=lse.device)
    launch(mass_rows_kernel, (blocks(all_rows, _SPAN), heads, batch))(
        lse, *(lse if x is None else x.contiguous() for x in (rows, table, head)), token, shift, queries, all_rows,
        EACH=block_q, STEP=step, SPAN=_SPAN, HAS_ROWS=rows is not None, HAS_ORDER=table is not None, num_warps=4,
    )  # fmt: skip
    return token, shift


def _spec(each: int, step: int, features: bool) -> AotSpec:
    constants = {"EACH": each, "STEP": step, "SPAN": _SPAN, "HAS_ROWS": features, "HAS_ORDER": features}
    types = dict.fromkeys(("ROWS", "TABLE", "HEAD", "TOKEN"), "*i32") | dict.fromkeys(("LSE", "SHIFT"), "*fp32")
    names = mass_rows_kernel.arg_names
    return AotSpec(
        name=f"block_mass_rows/{each}/{step}{'/rows+order' if features else ''}",
        fn=mass_rows_kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs=constants,
        options={"num_warps": 4},
        targets=("sm_90",),
    )


AOT_SPECS = [_spec(128, 1, False), _spec(16, 8, True)]
