"""The attention layers of one transformer: finding, wrapping, repairing and restoring them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from dit_accel.adapter import Adapter
from dit_accel_patches import sdpa_proxy
from dit_accel_patches.handles import ForwardState, LayerHandle
from dit_accel_patches.processor import HANDLE, handle_of, plain, why_not_wrap, wrap

__all__ = ["Layer", "find_layers"]


class Layer:
    """One self-attention module and what was done to it.

    Attributes:
        path: module path within the transformer.
        index: layer number.
        skipped: reason for which the layer is left to the model, ``None`` where it is wrapped.
    """

    def __init__(self, path: str, module: nn.Module, index: int, state: ForwardState, member: Any) -> None:
        self.path = path
        self.index = index
        self.skipped: str | None = None
        self._module: Any = module
        self._state = state
        self._member = member
        self._original: Any = None
        self._wrapped: Any = None
        self._before: dict[str, Any] = {}
        self._handle: LayerHandle | None = None
        self._proxied: str | None = None

    def wrap(self) -> None:
        """Wrap the processor that the module has now."""
        original = self._module.processor
        self.skipped = why_not_wrap(original)
        if self.skipped is not None:
            return
        if handle_of(original) is not None:
            # Somebody set the wrapped processor of another layer here.
            original = plain(original)
        sdpa = not hasattr(original, "_attention_backend")
        if sdpa:
            name = sdpa_proxy.module_of(original)
            self.skipped = sdpa_proxy.acquire(name)
            if self.skipped is not None:
                return
            self._proxied = name
            sdpa = not sdpa_proxy.dispatches(name)
        self._handle = LayerHandle(self._state, self.index, getattr(original, "_attention_backend", None), sdpa)
        self._original, self._before = original, dict(original.__dict__)
        self._wrapped = wrap(original, self._handle)
        if self._proxied is None:
            self._wrapped._attention_backend = self._member
        self._module.processor = self._wrapped

    def repair(self) -> str | None:
        """Undo what others did to the layer since the last look, and say what it was."""
        processor = self._module.processor
        if self._wrapped is None:
            if processor is self._original or why_not_wrap(processor) is not None:
                return None
            self.wrap()
            return None if self.skipped else f"{type(processor).__name__} was set; it is accelerated now"
        if processor is not self._wrapped:
            self._forget()
            self.wrap()
            kind = type(processor).__name__
            if self.skipped is not None:
                return f"processors were replaced, layers stay dense: {self.skipped}"
            return f"processors were replaced by {kind} (fuse_qkv_projections does that); they are accelerated again"
        handle = self._handle
        if handle is None or self._proxied is not None or processor._attention_backend is self._member:
            return None
        handle.backend = processor._attention_backend
        processor._attention_backend = self._member
        name = getattr(handle.backend, "value", handle.backend)
        return f"the attention backend was set to {name}; it computes the dense calls, dit_accel stays on"

    def restore(self) -> None:
        """Give the module its own processor object back, unless somebody has set another one since."""
        if self._wrapped is not None and self._module.processor is self._wrapped:
            self._carry_back()
            self._module.processor = self._original
        self._forget()

    def _carry_back(self) -> None:
        """Keep what others set on the processor meanwhile, such as a backend or a parallel configuration."""
        handle = self._handle
        for name, value in self._wrapped.__dict__.items():
            if name == HANDLE:
                continue
            if name == "_attention_backend" and value is self._member and handle is not None:
                value = handle.backend
                if name not in self._before and value is getattr(self._original, name, None):
                    continue
            if name not in self._before or self._before[name] is not value:
                self._original.__dict__[name] = value

    def _forget(self) -> None:
        if self._proxied is not None:
            sdpa_proxy.release(self._proxied)
        self._original = self._wrapped = self._handle = self._proxied = None


def find_layers(module: nn.Module, adapter: Adapter) -> Iterator[tuple[str, nn.Module]]:
    """Self-attention modules of a transformer with their paths, in the order of the adapter's block lists.

    ``"*"`` stands for every list of blocks, and for every attention module in a block.
    """
    names = [name for name, _ in module.named_children()] if "*" in adapter.blocks else adapter.blocks
    for name in names:
        blocks = getattr(module, name, None)
        if not isinstance(blocks, nn.ModuleList):
            continue
        for index, block in enumerate(blocks):
            if "*" in adapter.attention:
                yield from _any_attention(block, f"{name}.{index}")
                continue
            for attention in adapter.attention:
                layer: Any = block
                for part in attention.split("."):
                    layer = getattr(layer, part, None)
                if isinstance(layer, nn.Module) and hasattr(layer, "processor"):
                    yield f"{name}.{index}.{attention}", layer


def _any_attention(block: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Attention modules within a block, but for cross-attention that says so by the width of its keys."""
    for name, layer in block.named_modules():
        found: Any = layer
        if not hasattr(found, "processor"):
            continue
        crosses = getattr(found, "is_cross_attention", False)
        if crosses and found.cross_attention_dim != found.query_dim:
            continue
        yield f"{path}.{name}" if name else path, layer
