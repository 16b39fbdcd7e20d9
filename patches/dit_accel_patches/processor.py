"""Attention processors that say which layer is running.

Each attention module gets a shallow copy of its own processor whose class is a subclass of the original one. The subclass
runs the original ``__call__`` unchanged, so projections, RoPE, LoRA and fused weights stay the model's business.
"""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

from torch import nn

from dit_accel_patches.handles import LayerHandle, enter, leave

__all__ = ["CALLS", "HANDLE", "handle_of", "plain", "why_not_wrap", "wrap"]

#: Instance attribute that holds the :class:`LayerHandle` of a wrapped processor.
HANDLE = "_dit_accel"

#: Calls of ours in place of ``__call__`` of processor classes, by the name of the class; adapters put them here.
CALLS: dict[str, Any] = {}

_subclasses: dict[type, type] = {}


def why_not_wrap(processor: Any) -> str | None:
    """Reason for which a processor is left alone, or ``None``."""
    if processor is None:
        return "the attention module has no processor"
    if isinstance(processor, nn.Module):
        return f"{type(processor).__name__} is a module with weights of its own (an IP-Adapter)"
    if not hasattr(processor, "__dict__"):
        return f"{type(processor).__name__} cannot carry the layer (it has __slots__)"
    return None


def handle_of(processor: Any) -> LayerHandle | None:
    """Return the handle of a wrapped processor, ``None`` for any other."""
    handle = getattr(processor, "__dict__", {}).get(HANDLE)
    return handle if isinstance(handle, LayerHandle) else None


def wrap(processor: Any, handle: LayerHandle) -> Any:
    """Return a shallow copy of ``processor`` that runs as the layer of ``handle``."""
    wrapped = plain(processor)
    wrapped.__class__ = _subclass(type(wrapped))
    wrapped.__dict__[HANDLE] = handle
    return wrapped


def plain(processor: Any) -> Any:
    """Return a shallow copy of a processor, wrapped or not, as the class it came with."""
    cls = type(processor)
    base = getattr(cls, "_dit_accel_base", cls)
    result = _rebuild(base, processor.__dict__)
    handle = result.__dict__.pop(HANDLE, None)
    if isinstance(handle, LayerHandle) and "_attention_backend" in result.__dict__:
        result._attention_backend = handle.backend
    return result


def _rebuild(cls: Any, state: dict[str, Any]) -> Any:
    processor = cls.__new__(cls)
    processor.__dict__.update(state)
    return processor


def _subclass(cls: type) -> type:
    """The wrapped form of a processor class, one per class and process."""
    if cls in _subclasses:
        return _subclasses[cls]
    original: Any = CALLS.get(cls.__name__, cls.__call__)

    # wraps: models read the signature and drop every argument that is not named in it, RoPE included.
    @functools.wraps(original)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        previous = enter(self._dit_accel)
        try:
            return original(self, *args, **kwargs)
        finally:
            leave(previous)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # Copies and files get the model's own processor: a layer number means nothing outside its transformer.
        return _rebuild, (cls, plain(self).__dict__)

    name = f"DitAccel{cls.__name__}"
    while hasattr(sys.modules[__name__], name):
        name += "_"
    body = {
        "__call__": __call__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"{cls.__name__} that says which layer is running.",
        "_dit_accel_base": cls,
    }
    subclass = type(name, (cls,), body)
    setattr(sys.modules[__name__], name, subclass)
    _register_metadata(cls, subclass)
    _subclasses[cls] = subclass
    return subclass


def _register_metadata(cls: type, subclass: type) -> None:
    """Tell diffusers' layer skipping about the subclass where it knows the class."""
    try:
        from diffusers.hooks._helpers import AttentionProcessorRegistry
    except ImportError:
        return
    try:
        metadata = copy.copy(AttentionProcessorRegistry.get(cls))
    except ValueError:
        return
    AttentionProcessorRegistry.register(subclass, metadata)
