"""The entry in diffusers' registry of attention backends that leads the wrapped layers to us.

An entry is added; the active backend, the default of every model in the process, is never changed. A processor reaches the
entry only through its own ``_attention_backend``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

from dit_accel_patches.handles import LayerHandle, current
from dit_accel_patches.op import attend, set_dense_call

__all__ = ["BACKEND", "ensure_registered", "why_eager_only"]

#: Value of our member of ``AttentionBackendName``.
BACKEND = "dit_accel"


def ensure_registered() -> Any:
    """Register the backend unless it is, and return its member of ``AttentionBackendName``."""
    from diffusers.models import attention_dispatch as dispatch

    names, registry = dispatch.AttentionBackendName, dispatch._AttentionBackendRegistry
    member = names._value2member_map_.get(BACKEND)
    if member is None:
        # diffusers checks names against a closed Enum and has no way to add one, so the member is made by hand.
        member = str.__new__(names, BACKEND)
        member._name_ = BACKEND.upper()
        member._value_ = BACKEND
        member._sort_order_ = len(names._member_names_)
        names._member_map_[member._name_] = member
        names._member_names_.append(member._name_)
        names._value2member_map_[BACKEND] = member
    if member not in registry._backends:
        # Context parallel is declared because diffusers refuses to enable it otherwise; the operator exchanges tokens
        # and heads itself. Calls that it cannot serve go to the user's backend, which must support it itself.
        registry.register(member, constraints=[], supports_context_parallel=True)(_backend)
    set_dense_call(_dense_call)
    return member


def why_eager_only(query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout_p: float) -> str | None:
    """Reason for which a call cannot go through the operator at all, or ``None``."""
    if mask is not None and not isinstance(mask, Tensor):
        return f"attention mask of type {type(mask).__name__}"
    if dropout_p:
        return f"attention dropout {dropout_p}"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return "gradients are recorded"
    return _why_not_seen()


def _why_not_seen() -> str | None:
    """Reason for which ``F.scaled_dot_product_attention`` has to be called by that name: somebody waits for it.

    diffusers skips the scores of a layer that way, for guidance by perturbed attention.
    """
    for place in range(torch._C._len_torch_function_stack()):
        mode = torch._C._get_function_stack_at(place)
        if not isinstance(mode, DeviceContext):  # which stands there for a default device
            return f"{type(mode).__name__} takes the place of scaled_dot_product_attention"
    return None


def _backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Any:
    handle = current()
    if handle is not None:
        reason = why_eager_only(query, key, value, attn_mask, dropout_p)
        if reason is None and not return_lse:
            spread = _parallel_config is not None
            return attend(query, key, value, handle.layer, attn_mask, scale, is_causal, enable_gqa, spread)
        # A traced graph has no place for the call; there the reason is known to the forward call already.
        if not torch.compiler.is_compiling():
            handle.state.run.decline(handle.index, reason or "the caller wants the log-sum-exp")
    return _users_backend(handle)(
        query=query,
        key=key,
        value=value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        return_lse=return_lse,
        _parallel_config=_parallel_config,
    )


def _users_backend(handle: LayerHandle | None) -> Any:
    """The attention function that would have run without us, taking all arguments and using those it knows."""
    from diffusers.models import attention_dispatch as dispatch

    registry = dispatch._AttentionBackendRegistry
    name = handle.backend if handle is not None else None
    if name is None:
        name = registry._active_backend
    if name == BACKEND:
        # Somebody made us the default of the process; without a layer of ours there is nothing else to call.
        name = dispatch.AttentionBackendName.NATIVE
    function = registry._backends[name]
    known = registry._supported_arg_names[name]

    def call(**arguments: Any) -> Any:
        return function(**{key: value for key, value in arguments.items() if key in known})

    return call


def _dense_call(
    handle: LayerHandle | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
    gqa: bool,
    parallel_config: Any,
) -> Tensor:
    if handle is not None and handle.sdpa:
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa
        )
        return out.transpose(1, 2)
    result: Tensor = _users_backend(handle)(
        query=query,
        key=key,
        value=value,
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=gqa,
        _parallel_config=parallel_config,
    )
    return result
