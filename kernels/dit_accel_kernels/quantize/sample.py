"""Which tokens the quantiser looks at before it makes codes. Imports no triton.

The mean key may be that of any sample: the softmax does not care what is subtracted from all keys, and the log-sum-exp gets
back what was. e4m3 keeps its precision over 14 octaves, so that the scale of a channel may be several octaves too large; it
is made of the largest value of a sample with ``headroom``. Where a value is larger all the same, which its codes show, the
scales of its head are made again with that value: no value is ever cut off. INT8 values need the largest of all.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Sample", "sample_of"]

# Fewer than this many tokens are all looked at; of more every ``step``-th, which leaves between 1/3 and all of so many.
_MANY = 2048
_HEADROOM = 16.0
_LEAST = 2.0**-100


@dataclass(frozen=True)
class Sample:
    """A sample of the tokens of a head, in block order.

    Attributes:
        step: every how manieth token, from the first. Odd, so that it has nothing in common with the sides of a grid.
        count: number of tokens in it.
        parts: runs of ``ceil(count / parts)`` that are looked through by a program each.
        headroom: how many times as large as the largest magnitude in the sample the values of a channel may be.
        least: what they may be if that is 0.
    """

    step: int
    count: int
    parts: int
    headroom: float
    least: float


def sample_of(tokens: int, every: bool = False) -> Sample:
    """The sample of ``tokens`` tokens; with ``every`` all of them."""
    step = 1 if every or tokens < _MANY else tokens // (_MANY // 2) | 1
    room = (1.0, 0.0) if step == 1 else (_HEADROOM, _LEAST)
    return Sample(step, -(-tokens // step), 16 if every else 1, *room)
