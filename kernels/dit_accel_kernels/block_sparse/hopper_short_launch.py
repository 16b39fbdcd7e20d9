"""A launch of the Hopper kernel for short lists. Imports triton only when it is used."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from .._launch import launch
from .hopper_call import HopperCall

__all__ = ["launch_short"]


def launch_short(call: HopperCall, args: dict[str, Any], has_partial: bool, options: dict[str, str]) -> None:
    """Start the kernel on what :func:`~.hopper_call.hopper_call` has made; jobs are sorted by a kernel before it.

    Args:
        call: outputs, constants and programs.
        args: run-time arguments, lists included; those that this kernel has not are left out.
        has_partial: whether rows have partial blocks.
        options: what ptxas is told.
    """
    from .hopper_short import block_sparse_short_kernel

    names = _names() | {"num_warps"}
    launch(block_sparse_short_kernel, (call.programs,))(
        **{name: x for name, x in args.items() if name in names},
        **{name: x for name, x in call.constants.items() if name in names},
        HAS_PARTIAL=has_partial,
        CLAIM=True,
        launch_pdl=True,
        **options,
    )


@lru_cache(maxsize=1)
def _names() -> frozenset[str]:
    """What the kernel can be told."""
    from .hopper_short import block_sparse_short_kernel

    return frozenset(block_sparse_short_kernel.arg_names)
