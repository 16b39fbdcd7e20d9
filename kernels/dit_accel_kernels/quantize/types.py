"""What 8-bit attention is told and given: a precision, and quantised queries, keys and values. Imports no triton."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from .packing import unpack_int4

__all__ = ["LIMITS", "PRECISIONS", "Precision", "QuantizedQKV", "padded_dim", "padded_keys", "resolve_precision"]

# Largest magnitude of a code.
LIMITS = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
_QK = ("int8", "int4", "fp8")
_PV = ("bf16", "int8", "fp8")
_KEY_STEP = 128


@dataclass(frozen=True)
class Precision:
    """Number formats of one attention call.

    Attributes:
        qk: of queries and keys: ``"int8"``, ``"int4"`` or ``"fp8"`` (e4m3).
        pv: of weights and values: ``"int8"``, ``"fp8"``, or ``"bf16"`` for the 16-bit type of the input.
        smooth_k: subtract the mean key of a head before quantising. The softmax does not change by it and the log-sum-exp
            gets the difference back (SageAttention, arXiv 2410.02367).
        rotate: multiply queries and keys by a block Hadamard matrix, which spreads outlying channels and leaves their
            products alone (QuaRot, arXiv 2404.00456).
    """

    qk: str
    pv: str
    smooth_k: bool = True
    rotate: bool = False

    def __post_init__(self) -> None:
        if self.qk not in _QK:
            raise ValueError(f"qk must be one of {_QK}, got {self.qk!r}")
        if self.pv not in _PV:
            raise ValueError(f"pv must be one of {_PV}, got {self.pv!r}")


PRECISIONS: dict[str, Precision] = {
    "int8": Precision("int8", "bf16"),
    "int8_fp8": Precision("int8", "fp8"),
    "fp8": Precision("fp8", "fp8"),
    "int8_int8": Precision("int8", "int8"),
    "int4": Precision("int4", "bf16"),
    "int4_fp8": Precision("int4", "fp8"),
    "int4_int8": Precision("int4", "int8"),
}


def resolve_precision(precision: str | Precision) -> Precision:
    """A precision, by itself or by its name in :data:`PRECISIONS`.

    Raises:
        ValueError: no such name.
    """
    if isinstance(precision, Precision):
        return precision
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be a Precision or one of {tuple(PRECISIONS)}, got {precision!r}")
    return PRECISIONS[precision]


def padded_dim(head_dim: int) -> int:
    """Columns of the codes: 64, 128 or 256, zeros beyond ``head_dim``."""
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


def padded_keys(tokens: int) -> int:
    """Columns of transposed values: ``tokens`` rounded up to a multiple of 128."""
    return -(-tokens // _KEY_STEP) * _KEY_STEP


@dataclass(frozen=True)
class QuantizedQKV:
    """Queries, keys and values in block order, quantised; a code times its scale is the value.

    ``Dp`` is the head size rounded up to 64, 128 or 256 and ``Kb = ceil(Sk / block_k)``. All are contiguous but a 16-bit
    ``v``, which may be a view of the model's. Invalid keys have codes 0.

    Attributes:
        q: int8 or float8_e4m3fn ``[B, H, Sq, Dp]``; for INT4 uint8 ``[B, H, Sq, Dp / 2]``, see :func:`pack_int4`.
        q_scale: float32 ``[B, H, Sq]``, one a token; the softmax scale is not in it.
        k: like ``q``, ``[B, H, Sk, Dp]``.
        k_scale: float32 ``[B, H, Kb]``, one a key block.
        v: 16-bit ``[B, H, Sk, D]``; or int8 or float8_e4m3fn, transposed: ``[B, H, Dp, Sk_pad]``, the keys within each
            group of 16 in the order of :func:`operand_order`, zeros from ``Sk`` to ``Sk_pad``, a multiple of 128.
        v_scale: float32 ``[B, H, Dp]``, one a channel; ones for 16-bit values.
        k_mean: float32 ``[B, H, D]``, what was subtracted from the keys, before any rotation; ``None`` without smoothing.
            ``scale * q . k_mean`` is what the log-sum-exp of a query lacks.
        precision: the number formats.
        block_k: tokens in a key block.
    """

    q: Tensor
    q_scale: Tensor
    k: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor
    k_mean: Tensor | None
    precision: Precision
    block_k: int

    def unpacked(self) -> QuantizedQKV:
        """The same with INT4 codes spread to int8 ``[B, H, S, Dp]``; itself for other formats."""
        if self.precision.qk != "int4":
            return self
        return replace(self, q=unpack_int4(self.q), k=unpack_int4(self.k))
