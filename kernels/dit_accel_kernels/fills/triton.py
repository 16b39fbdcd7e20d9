"""One value into all elements of a tensor."""

from __future__ import annotations

import triton
import triton.language as tl

from ..aot_spec import AotSpec

__all__ = ["AOT_SPECS", "FILL_BLOCK", "fill_kernel"]

FILL_BLOCK = 1024


@triton.jit
def fill_kernel(x, count, VALUE: tl.constexpr, BLOCK: tl.constexpr):
    """Write ``VALUE`` into ``count`` elements from ``x`` on."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + place, tl.full((BLOCK,), VALUE, x.dtype.element_ty), mask=place < count)


AOT_SPECS = [
    AotSpec(
        name=f"fill/{dtype}",
        fn=fill_kernel,
        signature={"x": f"*{dtype}", "count": "i32", "VALUE": "constexpr", "BLOCK": "constexpr"},
        constexprs={"VALUE": value, "BLOCK": FILL_BLOCK},
        options={"num_warps": 4},
        divisible_by_16=("x",),
    )
    for dtype, value in (("fp32", 1.0), ("i32", 0))
]
