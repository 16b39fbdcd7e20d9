"""Cross-attention modules whose output a run may override, as FreeSwim does (arXiv 2511.14712).

A forward hook on each module, only where the method asks for it. To a compiler the override is one opaque operator.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from dit_accel.adapter import Adapter
from dit_accel_patches.aligned import tell_inductor
from dit_accel_patches.handles import TAGS, ForwardState, LayerHandle, find

__all__ = ["CrossLayers", "clean"]

_KEY = "_dit_accel_cross"


class CrossLayers:
    """The hooks on the cross-attention modules of one transformer.

    Args:
        module: the transformer.
        adapter: its ``cross`` names the modules inside a block.
        layers: paths of the self-attention modules; cross-attention belongs to the layer of the same block.
        state: the run.
    """

    def __init__(self, module: nn.Module, adapter: Adapter, layers: tuple[str, ...], state: ForwardState) -> None:
        self._hooked: list[tuple[nn.Module, Any]] = []
        for index, path in enumerate(layers):
            block = path.split(".")[:2]
            for name in adapter.cross:
                found = _submodule(module, [*block, *name.split(".")])
                if found is None or _KEY in found.__dict__:
                    continue
                found.__dict__[_KEY] = _Held(LayerHandle(state, index, None, False))
                self._hooked.append((found, found.register_forward_hook(_override)))

    def undo(self) -> None:
        """Remove the hooks; whatever others have hooked stays."""
        for module, hook in self._hooked:
            hook.remove()
            module.__dict__.pop(_KEY, None)
        self._hooked.clear()


def clean(module: nn.Module) -> None:
    """Remove the hooks from a transformer and its blocks, as a copy that took them along needs it."""
    for found in module.modules():
        if found.__dict__.pop(_KEY, None) is not None:
            for key in [key for key, hook in found._forward_hooks.items() if hook is _override]:
                del found._forward_hooks[key]


class _Held:
    """A handle that copies and files of a module do not take along."""

    def __init__(self, handle: LayerHandle | None = None) -> None:
        self.handle = handle

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _Held, ()


def _submodule(module: nn.Module, names: list[str]) -> nn.Module | None:
    found: Any = module
    for name in names:
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module) else None


def _override(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    held = module.__dict__.get(_KEY)
    if held is None or held.handle is None or not isinstance(output, Tensor):
        return None
    return cast(Any, torch.ops.dit_accel.cross)(output, held.handle.layer)


def _cross(output: Tensor, layer: Tensor) -> Tensor:
    handle = find(int(layer))
    if handle is None or handle.state.thread is None:
        return output.clone()
    found = handle.state.run.cross(handle.index, output)
    # An operator may not return its input; what the run keeps must not be written to by the model either.
    return found.clone(memory_format=torch.contiguous_format)


def _cross_fake(output: Tensor, layer: Tensor) -> Tensor:
    tell_inductor(cast(Any, torch.ops.dit_accel.cross).default)  # what is cloned is aligned
    return torch.empty_like(output, memory_format=torch.contiguous_format)


_SCHEMA = "(Tensor output, Tensor layer) -> Tensor"
_tagged: dict[str, Any] = {"tags": TAGS} if TAGS else {}
_op = torch.library.custom_op("dit_accel::cross", _cross, mutates_args=(), schema=_SCHEMA, **_tagged)
_op.register_fake(_cross_fake)
