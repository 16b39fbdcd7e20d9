"""Tells inductor that the operator's output is aligned.

Inductor takes the output of a foreign operator for unaligned if one of its inputs may be, and takes every input on the CPU
for such; ours has the layer's number there. What reads the attention output then loads single elements: the kernel that
puts it beside the feed-forward part in FLUX took a third longer.
"""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["ALIGNMENT", "tell_inductor"]

#: Bytes whose multiple the address of every output is.
ALIGNMENT = 16

_told: set[Any] = set()


def tell_inductor(operator: Any) -> None:
    """Have inductor compile the operator (an overload) as it does any foreign one, but for what it thinks of its output.

    Called while a graph with the operator is traced. Without inductor, or with one that is built otherwise than those known
    here, nothing happens, and the output counts as unaligned.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is None or operator in _told:
        return
    _told.add(operator)
    if operator in lowering.lowerings:
        return  # compiled before, or somebody else has said how
    try:
        _register(lowering, operator)
    except (AttributeError, ImportError, TypeError):
        lowering.lowerings.pop(operator, None)


def _register(lowering: Any, operator: Any) -> None:
    from torch._inductor.virtualized import V
    from torch._library.utils import get_layout_constraint_tag

    constraint = lowering.tag_to_layout_constraint(get_layout_constraint_tag(operator, with_default=True))
    lowering.make_fallback(operator, layout_constraint=constraint, warn=False, override_decomp=True)
    foreign = lowering.lowerings[operator]

    def aligned(*args: Any, **kwargs: Any) -> Any:
        out = foreign(*args, **kwargs)
        V.graph.unaligned_buffers.discard(out.get_name())
        return out

    aligned._is_fallback_handler = True  # type: ignore[attr-defined]
    lowering.lowerings[operator] = aligned
