"""Token windows in the Hopper kernel: which logits of a tile count, in the bits of :mod:`.near`.

The producer writes the bits of a tile's keys and the bases of its one or two blocks into shared memory; a key of a whole
block has none, one that is not there has a bit that no query has. A consumer finds the bits of its rows, for either block,
while the product with the keys runs.
"""

# Inside a `@gluon.jit` body every value is the compiler's, not Python's.

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["biased_tiles", "bounds", "hide", "key_bits", "row_bits"]


@gluon.jit
def biased_tiles(n, n_full, tiles, EVEN_K: gl.constexpr, PARTS: gl.constexpr):
    """Tiles with partial blocks, which come first: at least one, and one entry more where a ragged block goes ahead."""
    n_partial = n - n_full
    entries = n_partial + (n & 1 if PARTS == 2 else 0)
    if not EVEN_K:
        entries += 1
    found = gl.minimum((entries + (PARTS - 1)) // PARTS, tiles)
    return gl.maximum(gl.where(n_partial == 0, 1, found), 1)


@gluon.jit
def _partial(n, n_full, first, visit):
    """Whether the entry of a list that is visited as number ``visit`` is a partial block."""
    place = n - 1 - visit
    place = gl.where(visit == 0, first, gl.where(place == first, n - 1, place))
    return (visit < n) & (place >= n_full)


@gluon.jit
def key_bits(k_bits, k_base, token, here, one, two, o_k, n, n_full, first, t, kb, PARTS: gl.constexpr):
    """Bits of the keys of tile ``t``, and the bases of its blocks ``one`` and ``two``."""
    if PARTS == 1:
        partial = _partial(n, n_full, first, t)
    else:
        odd = n & 1
        left = _partial(n, n_full, first, gl.maximum(2 * t - odd, 0))
        right = _partial(n, n_full, first, 2 * t + 1 - odd)
        partial = gl.where(o_k < 64, left, right)
    bits = gl.load(k_bits + token, mask=here & partial, other=0)
    o = gl.arange(0, 2, layout=gl.BlockedLayout([1], [32], [1], [0]))
    block = gl.where(o == 0, one, two)
    return gl.where(here, bits, 1073741824), gl.load(k_base + block, mask=block < kb, other=0)


@gluon.jit
def bounds(q_lo, q_hi, i_q, i_w, sq, PARTS: gl.constexpr):
    """Packed bounds of the windows of a consumer's 64 rows, once for each block of a tile."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    row = gl.arange(0, 64 * PARTS, layout=LAYOUT) % 64
    o_q = i_q * 128 + i_w * 64 + row
    there = o_q.to(gl.int64) < sq
    return gl.load(q_lo + o_q, mask=there, other=0), gl.load(q_hi + o_q, mask=there, other=0)


@gluon.jit
def _axis(lo, hi, base, SHIFT: gl.constexpr):
    start = (base >> SHIFT) & 1023
    lo = gl.minimum(gl.maximum(((lo >> SHIFT) & 1023) - start, 0), 10)
    hi = gl.minimum(gl.maximum(((hi >> SHIFT) & 1023) - start, 0), 10)
    return (((1 << hi) - 1) & -(1 << lo)) << SHIFT


@gluon.jit
def _here(packed):
    """The same, but what is computed from it is not kept over a loop, which costs registers."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [packed], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _hidden(s, unseen, keys):
    """Minus infinity unless no bit of the key is unseen, in two instructions; LLVM would pack the outcomes into bits."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred seen; .reg .b32 both;
        and.b32 both, $2, $3; setp.eq.s32 seen, both, 0; selp.f32 $0, $1, 0fFF800000, seen;
        }""",
        "=f,f,r,r", [s, unseen, keys], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def row_bits(extras, stage):
    """Bits of all codes, from the base of each block of the tile on, that each row does *not* see, and all above."""
    _, bases, lo, hi = extras
    ALL: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    two = bases.index(stage).load(ALL)
    o = gl.arange(0, 2, layout=ALL)
    base = gl.sum(gl.where(o == 0, two, 0), 0)
    if lo.shape[0] == 128:
        row = gl.arange(0, 128, layout=lo.type.layout)
        base = gl.where(row < 64, base, gl.sum(gl.where(o == 1, two, 0), 0))
    lo, hi = _here(lo), _here(hi)
    return ~(_axis(lo, hi, base, 0) | _axis(lo, hi, base, 10) | _axis(lo, hi, base, 20))


@gluon.jit
def hide(s, extras, stage, rows, S_LAYOUT: gl.constexpr, PARTS: gl.constexpr):
    """Minus infinity where a row of ``s [64, 128]`` does not see a key."""
    keys = extras[0].index(stage).load(gl.SliceLayout(0, S_LAYOUT))
    keys = gl.expand_dims(keys, 0)
    if PARTS == 1:
        unseen = gl.expand_dims(gl.convert_layout(rows, gl.SliceLayout(1, S_LAYOUT)), 1)
        return _hidden(s, unseen, keys)
    else:
        halves = s.reshape([64, 2, 64])
        LAYOUT: gl.constexpr = halves.type.layout
        unseen = gl.convert_layout(rows.reshape([2, 64]).permute([1, 0]), gl.SliceLayout(2, LAYOUT))
        keys = gl.convert_layout(keys.reshape([1, 2, 64]), LAYOUT)
        halves = _hidden(halves, gl.expand_dims(unseen, 2), keys)
        return gl.convert_layout(halves.reshape([64, 128]), S_LAYOUT)
