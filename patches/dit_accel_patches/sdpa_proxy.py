"""For models that call ``F.scaled_dot_product_attention`` themselves: a stand-in for the name ``F`` of their file.

``torch.nn.functional`` is left alone. Only the module attribute ``F`` of the file that defines the processor is exchanged,
for as long as some transformer needs it, and whatever is not a layer of ours passes straight through. Likewise the name
``dispatch_attention_fn`` of a file whose processors call it without a backend of their own (Cosmos).
"""

from __future__ import annotations

import sys
import threading
import types
from typing import Any

import torch
from torch import Tensor

from dit_accel_patches.backend import ensure_registered, why_eager_only
from dit_accel_patches.handles import current
from dit_accel_patches.op import attend

__all__ = ["acquire", "dispatches", "module_of", "release"]


class _FunctionalProxy(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(torch.nn.functional, name)


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    handle = current()
    if handle is not None and query.ndim == 4:
        reason = why_eager_only(query, key, value, attn_mask, dropout_p)
        if reason is None:
            q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            return attend(q, k, v, handle.layer, attn_mask, scale, is_causal, enable_gqa).transpose(1, 2)
        if not torch.compiler.is_compiling():
            handle.state.run.decline(handle.index, reason)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _dispatch(*args: Any, **kwargs: Any) -> Any:
    """``dispatch_attention_fn`` that names our backend inside a layer of ours."""
    if current() is not None and kwargs.get("backend") is None:
        kwargs["backend"] = _target[1]
    return _target[0](*args, **kwargs)


_proxy = _FunctionalProxy("dit_accel_patches.functional")
_proxy.__dict__["scaled_dot_product_attention"] = _sdpa
_users: dict[str, int] = {}
_target: list[Any] = []
_DISPATCH = "dispatch_attention_fn"
_lock = threading.Lock()


def module_of(processor: Any) -> str:
    """Name of the file that defines how a processor computes."""
    return str(type(processor).__call__.__module__)


def dispatches(module_name: str) -> bool:
    """Whether the processors of a module call ``dispatch_attention_fn``."""
    return _DISPATCH in vars(sys.modules[module_name])


def acquire(module_name: str) -> str | None:
    """Exchange ``F`` of a module and count the user, or return the reason why it cannot be done."""
    with _lock:
        module = sys.modules[module_name]
        found = dispatches(module_name)
        if found and not _target:
            # Kept as a list that a traced graph may read: registering is nothing to be traced.
            _target.extend((module.__dict__[_DISPATCH], ensure_registered()))
        if found:
            module.__dict__[_DISPATCH] = _dispatch
        if getattr(module, "F", None) in (torch.nn.functional, _proxy):
            module.__dict__["F"] = _proxy
        elif not found:
            return f"{module_name} does not call attention through a name F or an attention backend"
        _users[module_name] = _users.get(module_name, 0) + 1
        return None


def release(module_name: str) -> None:
    """Undo one :func:`acquire`; the last one puts ``F`` back."""
    with _lock:
        _users[module_name] -= 1
        if _users[module_name]:
            return
        del _users[module_name]
        module = sys.modules[module_name]
        if module.__dict__.get(_DISPATCH) is _dispatch:
            module.__dict__[_DISPATCH] = _target[0]
        if module.__dict__.get("F") is _proxy:
            module.__dict__["F"] = torch.nn.functional
