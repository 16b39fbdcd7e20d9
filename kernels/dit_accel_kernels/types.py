"""The data that kernels and planner exchange.

*Natural order* is the order in which the model hands over its tokens; *block order* is the order after a
:class:`TokenOrder`. Blocks are consecutive runs of ``block_q`` or ``block_k`` tokens of the block order; the last one may
be ragged. ``Qb = ceil(Sq / block_q)`` and ``Kb = ceil(Sk / block_k)``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["BlockLists", "GatheredKeys", "Pooled", "TokenOrder", "TokenWindows"]


@dataclass(frozen=True)
class BlockLists:
    """Key blocks that each query block visits, as compressed rows.

    The batch and head dimensions may have size 1; they are then shared by all batch elements or heads. Rows may be the same
    for several heads, but must not overlap otherwise.

    Attributes:
        row_start: int32 ``[B|1, H|1, Qb]``, offset of the first entry of the row in ``indices``.
        full: int32 ``[B|1, H|1, Qb]``, number of blocks that are computed whole.
        partial: int32 ``[B|1, H|1, Qb]`` or ``None``, number of further blocks in which token windows apply.
        indices: int32 ``[capacity]``; each row holds its ``full`` sorted block ids, then its ``partial`` sorted ones.
        block_q: tokens in a query block.
        block_k: tokens in a key block.
    """

    row_start: Tensor
    full: Tensor
    partial: Tensor | None
    indices: Tensor
    block_q: int
    block_k: int


@dataclass(frozen=True)
class TokenOrder:
    """A token permutation per head, chosen from a small table.

    Position ``i`` of head ``h`` in block order holds token ``table[head[h], i]`` of natural order.

    Attributes:
        table: int32 ``[N, S]``, each row a permutation of ``range(S)``.
        head: int32 ``[H]``, the row of ``table`` that each head uses.
    """

    table: Tensor
    head: Tensor


@dataclass(frozen=True)
class Pooled:
    """The remainder: each block whose bit is 0 enters the online softmax as one key.

    Attributes:
        k: ``[B, H, Kb, D]`` mean key of each block.
        v: ``[B, H, Kb, D]`` mean value of each block.
        bias: float32 ``[B|1, H|1, Kb]``, log of the number of valid keys in the block; ``-inf`` where there is none.
        bits: int32 ``[B|1, H|1, Qb, ceil(Kb / 32)]``; bit ``j % 32`` of word ``j // 32`` says that block ``j`` is exact
            for that row and must not be pooled.
    """

    k: Tensor
    v: Tensor
    bias: Tensor
    bits: Tensor


@dataclass(frozen=True)
class TokenWindows:
    """Token-level intervals, consulted only in ``partial`` blocks, all in block order.

    A key is visible to a query iff ``q_lo[a, i] <= k_code[a, j] < q_hi[a, i]`` on each of the three axes ``a``, or if
    ``k_code[0, j] < 0`` (text and other tokens that everybody sees).

    Attributes:
        q_lo: int32 ``[3, Sq]``.
        q_hi: int32 ``[3, Sq]``.
        k_code: int32 ``[3, Sk]``.
    """

    q_lo: Tensor
    q_hi: Tensor
    k_code: Tensor


@dataclass(frozen=True)
class GatheredKeys:
    """Further keys that enter the same online softmax, gathered in groups from a sequence of their own.

    Single columns of the map are groups of one token of the keys themselves; the levels of a pyramid are groups of pooled
    keys with the log of their token count as bias. Group ``j`` holds the keys ``j * group`` up to ``(j + 1) * group`` of
    the sequence, the last one may be ragged.

    Attributes:
        k: ``[B, H, Se, D]``.
        v: ``[B, H, Se, D]``.
        bias: float32 ``[B|1, H|1, Se]``, added to the scaled logits, natural logarithm: 0 for a token, the log of the
            number of valid tokens for a pooled key; ``-inf`` for a key that nobody sees and that may hold NaN.
        row_start: int32 ``[B|1, H|1, Qb]``, offset of the first entry of the row in ``indices``.
        count: int32 ``[B|1, H|1, Qb]``, number of groups of the row; may be 0.
        indices: int32 ``[capacity]``, sorted group ids of each row, each at most once.
        group: keys in a group, a power of two from 1 to 64.
    """

    k: Tensor
    v: Tensor
    bias: Tensor
    row_start: Tensor
    count: Tensor
    indices: Tensor
    group: int
