"""Reading arguments of a forward call by name, however they were passed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

__all__ = ["argument"]


@functools.lru_cache(maxsize=256)
def _positions(cls: Any) -> Mapping[str, int]:
    names = list(inspect.signature(cls.forward).parameters)[1:]
    return {name: index for index, name in enumerate(names)}


def argument(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Any:
    """Return the argument ``name`` of a forward call of ``module``, ``None`` if it was not given."""
    if name in kwargs:
        return kwargs[name]
    cls: Any = type(module)
    position = _positions(cls).get(name, len(args))
    return args[position] if position < len(args) else None
