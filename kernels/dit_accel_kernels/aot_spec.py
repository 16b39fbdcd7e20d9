"""What an ahead-of-time compilation of one kernel needs to know. Imports no triton."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["ALL_TARGETS", "AotSpec"]

ALL_TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class AotSpec:
    """One kernel with one set of compile-time constants, for some GPUs.

    Each operator module that holds Triton kernels exports ``AOT_SPECS: list[AotSpec]``; ``dit_accel_kernels.aot``
    compiles them all without a GPU and reports registers, spills and shared memory.

    Attributes:
        name: unique and readable, for example ``"block_sparse/d128/128x64/bf16"``.
        fn: the ``@triton.jit`` (or Gluon) function.
        signature: argument name to Triton type (``"*bf16"``, ``"i32"``, ``"fp32"``, ``"constexpr"``).
        constexprs: values of the constexpr arguments.
        options: ``num_warps``, ``num_stages`` and the like.
        targets: subset of :data:`ALL_TARGETS`.
        max_spill_bytes: the stated bound of register spills.
        gluon: compile through Gluon's front end.
        divisible_by_16: names of pointer or integer arguments known to be divisible by 16.
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ALL_TARGETS
    max_spill_bytes: int = 0
    gluon: bool = False
    divisible_by_16: tuple[str, ...] = ()
