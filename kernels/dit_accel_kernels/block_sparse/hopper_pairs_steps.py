"""What a consumer of the Hopper kernel for pairs of query blocks does with one tile; see :mod:`.hopper_pairs`.

As in :mod:`.hopper_steps`, with tiles of 64 or 128 keys; but a tile may come *alone*, with one of the other consumer
between it and the one before, which is given back with it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .hopper_steps import _logits, _wait_values, next_stage, release

__all__ = ["fast_pair_step", "first_pair_tile", "pair_step", "skip"]


@gluon.jit
def skip(bars, stage, phase, count, STAGES: gl.constexpr):
    """Pass over ``count`` tiles that are not this consumer's: wait for each, lest it is left more than a round behind."""
    for _ in range(count):
        stage, phase = next_stage(stage, phase, STAGES)
        mbarrier.wait(bars[0].index(stage), phase)
        mbarrier.wait(bars[1].index(stage), phase)
        release(bars[2].index(stage))
    return stage, phase


@gluon.jit
def _shares(weights, TILE: gl.constexpr):
    """Sums of the four shares of each row that different lanes hold, ``[64, 4]``: lanes add up once a job."""
    return gl.sum(gl.sum(weights.reshape([64, TILE // 8, 4, 2]), 3), 1)


@gluon.jit
def _start_keys(q_op, k_bufs, bars, stage, phase, S_LAYOUT: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr):
    """Begin the product with the keys at ``(stage, phase)``."""
    mbarrier.wait(bars[0].index(stage), phase)
    s = gl.zeros([64, TILE], gl.float32, layout=S_LAYOUT)
    k_tile = k_bufs.index(stage).reshape([TILE, D]).permute([1, 0])
    return warpgroup_mma(q_op, k_tile, s, use_acc=False, is_async=True)


@gluon.jit
def _start(
    acc, p, q_op, k_bufs, v_bufs, bars, stage, phase, here, here_phase, more,
    S_LAYOUT: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """Begin the product with the keys ``here``, and that with the values before on top of ``acc`` if there is ``more``."""
    s = _start_keys(q_op, k_bufs, bars, here, here_phase, S_LAYOUT, D, TILE)
    mbarrier.wait(bars[1].index(stage), phase)
    acc = warpgroup_mma(p, v_bufs.index(stage).reshape([TILE, D]), acc, use_acc=more, is_async=True)
    return acc, s


@gluon.jit
def _pass(bars, stage, phase, alone, STAGES: gl.constexpr):
    """The place of the next tile after ``(stage, phase)``; if it comes ``alone``, one of the other consumer is between."""
    between, between_phase = next_stage(stage, phase, STAGES)
    here, here_phase = between, between_phase
    if alone:
        mbarrier.wait(bars[0].index(between), between_phase)
        mbarrier.wait(bars[1].index(between), between_phase)
        here, here_phase = next_stage(between, between_phase, STAGES)
    return between, here, here_phase


@gluon.jit
def _give_back(bars, between, here, alone):
    """Say that this warpgroup has done with the keys ``here``, the values of the tile before, and the tile between."""
    release(bars[2].index(here))
    if alone:
        mbarrier.arrive(bars[2].index(between), count=1)


@gluon.jit
def first_pair_tile(
    q_op, k_bufs, extras, bars, stage, phase, scale2, masked, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
    D: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """Weights, maximum and sums of the first tile of a job, under nothing but what the other consumer multiplies."""
    s = _start_keys(q_op, k_bufs, bars, stage, phase, S_LAYOUT, D, TILE)
    s = warpgroup_mma_wait(0, deps=[s])
    if masked != 0:
        s = s + gl.expand_dims(extras.index(stage).load(gl.SliceLayout(0, S_LAYOUT)), 0)
    row_max = gl.maximum(gl.max(s, 1) * scale2, -1.0e30)
    weights = gl.exp2(s * scale2 - gl.expand_dims(row_max, 1))
    shares = _shares(weights, TILE)
    return gl.convert_layout(weights.to(k_bufs.dtype), P_LAYOUT), row_max, shares


@gluon.jit
def fast_pair_step(
    acc, p, row_max, shares, q_op, k_bufs, v_bufs, extras, bars, stage, phase, alone, scale2, more,
    S_LAYOUT: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, TILE: gl.constexpr, BIASED: gl.constexpr,
):  # fmt: skip
    """Like :func:`pair_step`, but weights stay relative to ``row_max``: no maximum, nothing to rescale."""
    between, here, here_phase = _pass(bars, stage, phase, alone, STAGES)
    acc, s = _start(acc, p, q_op, k_bufs, v_bufs, bars, stage, phase, here, here_phase, more, S_LAYOUT, D, TILE)
    s = _logits(s, extras, here, S_LAYOUT, -1 if BIASED else 0)
    weights = gl.exp2(s * scale2 - gl.expand_dims(row_max, 1))
    shares += _shares(weights, TILE)
    new_p = gl.convert_layout(weights.to(p.dtype), p.type.layout)
    acc, p, new_p, shares = _wait_values(acc, p, new_p, shares)
    _give_back(bars, between, here, alone)
    return acc, new_p, shares, here, here_phase


@gluon.jit
def pair_step(
    acc, p, row_max, shares, q_op, k_bufs, v_bufs, extras, bars, stage, phase, alone, scale2, more,
    S_LAYOUT: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, TILE: gl.constexpr, BIASED: gl.constexpr,
):  # fmt: skip
    """Add the values of the tile at ``(stage, phase)``, turn the logits of the next one into weights."""
    between, here, here_phase = _pass(bars, stage, phase, alone, STAGES)
    acc, s = _start(acc, p, q_op, k_bufs, v_bufs, bars, stage, phase, here, here_phase, more, S_LAYOUT, D, TILE)
    s = _logits(s, extras, here, S_LAYOUT, -1 if BIASED else 0)
    new_max = gl.maximum(row_max, gl.max(s, 1) * scale2)
    weights = gl.exp2(s * scale2 - gl.expand_dims(new_max, 1))
    shrink = gl.exp2(row_max - new_max)
    SHARES: gl.constexpr = gl.SliceLayout(1, shares.type.layout)
    shares = shares * gl.expand_dims(gl.convert_layout(shrink, SHARES), 1) + _shares(weights, TILE)
    new_p = gl.convert_layout(weights.to(p.dtype), p.type.layout)
    acc, p, new_p, shares = _wait_values(acc, p, new_p, shares)
    _give_back(bars, between, here, alone)
    acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout)), 1)
    return acc, new_p, new_max, shares, here, here_phase
