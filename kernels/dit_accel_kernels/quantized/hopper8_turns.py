"""Whose turn it is to start products: the consumers of the 8-bit Hopper kernel take turns; see :mod:`.hopper8`.

Left to themselves both wait for their products at the same time and then take exponentials at the same time, and neither
unit is busy. So a consumer starts its products when the other has done with its own. The barriers are hardware barriers 8
and 9, by their numbers: Triton itself uses those below 4 here. What is asked for by inline assembly is given in the order
in which it is written.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["give_first_turn", "give_turn", "wait_turn"]


@gluon.jit
def wait_turn(anything, I_W: gl.constexpr):
    """Wait until it is the turn of consumer ``I_W``; returns its argument, an int32."""
    TEXT: gl.constexpr = "bar.sync 8, 256; mov.u32 $0, $1;" if I_W == 0 else "bar.sync 9, 256; mov.u32 $0, $1;"
    return gl.inline_asm_elementwise(TEXT, "=r,r", [anything], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def give_first_turn(anything):
    """Let consumer 0 begin, said by consumer 1; returns its argument, an int32."""
    return gl.inline_asm_elementwise(
        "bar.arrive 8, 256; mov.u32 $0, $1;", "=r,r", [anything], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def give_turn(scale, zero, I_W: gl.constexpr):
    """Let the other consumer start; returns ``scale``, a float32 that the exponentials must need.

    It is put together with a clock that is read behind the barrier, of which ``zero`` leaves nothing: ptxas would do the
    exponentials first otherwise.
    """
    TEXT: gl.constexpr = (
        """{ .reg .u32 t, u; bar.arrive 9, 256; mov.u32 t, %clock; and.b32 t, t, $2; mov.b32 u, $1; or.b32 u, u, t;
        mov.b32 $0, u; }"""
        if I_W == 0
        else """{ .reg .u32 t, u; bar.arrive 8, 256; mov.u32 t, %clock; and.b32 t, t, $2; mov.b32 u, $1; or.b32 u, u, t;
        mov.b32 $0, u; }"""
    )
    return gl.inline_asm_elementwise(TEXT, "=f,f,r", [scale, zero], dtype=gl.float32, is_pure=False, pack=1)
