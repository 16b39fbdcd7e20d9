"""Compiled regions with nothing but the attention operator, or one that does nothing: what the operator costs there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["compiled_regions"]


def compiled_regions(qkv: list[Tensor]) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """A region with our operator for the layer that is running, and one whose operator allocates its output and returns.

    Both are compiled already.

    Args:
        qkv: ``[B, S, H, D]`` each.
    """
    from dit_accel_patches.handles import current

    handle = current()
    if handle is None:
        raise RuntimeError("no layer is running")
    made = []
    for operator in (torch.ops.dit_accel.attend, _empty_operator()[0]):
        region = functools.partial(_region(operator), *qkv, handle.layer)
        region()
        made.append(region)
    return made[0], made[1]


def _region(operator: Any) -> Any:
    @torch.compile(fullgraph=True, dynamic=False)
    def region(q: Tensor, k: Tensor, v: Tensor, number: Tensor) -> Tensor:
        found: Tensor = operator(q, k, v, number, None, None, False, False)
        return found

    return region


@functools.cache
def _empty_operator() -> Any:
    """The operator, and the library that holds it, which must live."""
    from dit_accel_patches import op

    library = torch.library.Library("host_overhead", "FRAGMENT")
    library.define("empty" + op._SCHEMA)
    library.impl("empty", lambda query, *rest: torch.empty_like(query), "CompositeExplicitAutograd")
    torch.library.register_fake("host_overhead::empty", op._attend_fake, lib=library)
    return torch.ops.host_overhead.empty, library
