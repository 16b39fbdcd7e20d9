"""The map of expected errors from block moments and the mass of each block, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..._common import blocks, next_power_of_2
from ..._launch import capability, launch
from ...aot_spec import AotSpec
from ...spread.triton.moments import Moments
from ...spread.triton.scores import _product, _split, _tile

__all__ = ["AOT_SPECS", "errors_triton"]


@triton.jit
def _masses(MASS, i_map, row, col, rows, cols):
    """A tile of the map of masses, 0 beyond it."""
    p_mass = MASS + (i_map * rows + row)[:, None] * cols + col[None, :]
    return tl.load(p_mass, mask=(row < rows)[:, None] & (col < cols)[None, :], other=0.0)


# Counts are not specialised: another number of tokens must not compile another kernel.
@triton.jit(do_not_specialize=["rows", "cols", "maps"])
def fine_spread_errors_kernel(
    MASS, QUERY, KEY, VALUE, SQUARE, OUT, rows, cols, maps, scale,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program: BM blocks of queries of one head: their output, then what each block of keys would leave."""
    i_map = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    first = tl.program_id(0) * BM
    row = first + tl.arange(0, BM)
    q_step, k_step = tl.cast(maps, tl.int64) * rows * DIM, tl.cast(maps, tl.int64) * cols * DIM
    QUERY += i_map * rows * DIM + 2 * q_step
    KEY += i_map * cols * DIM + 2 * k_step
    VALUE += i_map * cols * DIM
    b_out = tl.zeros([BM, WIDTH], tl.float32)
    for start in range(0, cols, BN):
        b_p, b_p_rest = _split(_masses(MASS, i_map, row, start + tl.arange(0, BN), rows, cols))
        b_v = _tile(VALUE, start, cols, channel, BN, DIM)
        b_out = tl.dot(b_p_rest, b_v, b_out)
        b_out = tl.dot(b_p, _tile(VALUE + k_step, start, cols, channel, BN, DIM), b_out)
        b_out = tl.dot(b_p, b_v, b_out)
    b_length = tl.sum(b_out * b_out, 1)
    b_o, b_o_rest = _split(b_out)
    b_vary = _tile(QUERY, first, rows, channel, BM, DIM)
    for start in range(0, cols, BN):
        col = start + tl.arange(0, BN)
        apart = tl.dot(b_vary, _tile(KEY, start, cols, channel, BN, DIM).T)
        b_v = _tile(VALUE, start, cols, channel, BN, DIM)
        b_v_rest = _tile(VALUE + k_step, start, cols, channel, BN, DIM)
        b_square = tl.load(SQUARE + i_map * cols + col, mask=col < cols, other=0.0)
        far = b_square[None, :] - 2 * _product(b_o, b_o_rest, b_v, b_v_rest) + b_length[:, None]
        # NaN must stay: it says that the inputs were not finite.
        far = tl.maximum(far, 0.0, propagate_nan=tl.PropagateNan.ALL)
        apart = tl.maximum(apart, 0.0, propagate_nan=tl.PropagateNan.ALL)
        found = _masses(MASS, i_map, row, col, rows, cols) * tl.sqrt(apart) * tl.sqrt(far) * scale
        p_out = OUT + (i_map * rows + row)[:, None] * cols + col[None, :]
        tl.store(p_out, found, mask=(row < rows)[:, None] & (col < cols)[None, :])


def _tile_of(dim: int, capability: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constants and options of a launch; a capability of 0 is a GPU of AMD."""
    if not capability:
        return {"BM": 32, "BN": 32}, {"num_warps": 4, "num_stages": 1}
    if capability == 90:
        return {"BM": 64, "BN": 32}, {"num_warps": 8 if dim > 64 else 4, "num_stages": 2}
    return {"BM": 16 if dim > 64 else 32, "BN": 32}, {"num_warps": 4, "num_stages": 2}


def errors_triton(mass: Tensor, moments: Moments, scale: float) -> Tensor:
    """Expected error of each pair of blocks, float32 ``[B, H, Qb, Kb]``.

    Args:
        mass: float32 ``[B, H, Qb, Kb]``.
        moments: of one order of blocks.
        scale: factor of the logits.
    """
    batch, heads, rows, cols = mass.shape
    dim = moments.query.shape[-1]
    tile, options = _tile_of(dim, capability(mass))
    out = mass.new_empty(mass.shape)
    launch(fine_spread_errors_kernel, (blocks(rows, tile["BM"]), batch * heads))(
        mass, moments.query, moments.key, moments.value, moments.square, out, rows, cols, batch * heads, scale,
        DIM=dim, WIDTH=next_power_of_2(dim), **tile, **options,
    )  # fmt: skip
    return out


def _spec(dim: int, targets: tuple[str, ...], least: int) -> AotSpec:
    tile, options = _tile_of(dim, least)
    constants = {"DIM": dim, "WIDTH": next_power_of_2(dim), **tile}
    types = dict.fromkeys(("QUERY", "KEY", "VALUE"), "*bf16") | dict.fromkeys(("MASS", "SQUARE", "OUT"), "*fp32")
    types["scale"] = "fp32"
    names = fine_spread_errors_kernel.arg_names
    return AotSpec(
        name=f"fine_spread_errors/d{dim}/{least or 'amd'}",
        fn=fine_spread_errors_kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs=constants,
        options=options,
        targets=targets,
        divisible_by_16=("QUERY", "KEY", "VALUE"),
    )


AOT_SPECS = [
    _spec(dim, targets, least)
    for dim in (128, 64)
    for targets, least in ((("sm_80", "sm_89", "sm_100"), 80), (("sm_90",), 90), (("gfx942",), 0))
]
