"""The custom operator through which every accelerated layer goes.

To a compiler it is one opaque node with the layer as a tensor, so one graph serves all layers. Its body is Python that
runs at run time: it finds the layer and its run, and decides per call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from dit_accel_patches.calls import Call
from dit_accel_patches.handles import LayerHandle, find

__all__ = ["DenseCall", "attend", "set_dense_call"]

#: Dense attention of a layer: ``(handle, q, k, v, mask, scale, causal, gqa) -> out``, all ``[B, S, H, D]``.
DenseCall = Callable[
    ["LayerHandle | None", Tensor, Tensor, Tensor, "Tensor | None", "float | None", bool, bool], Tensor
]

_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor layer, Tensor? mask, float? scale, bool causal, bool gqa)"
    " -> Tensor"
)
_dense_call: DenseCall | None = None


def set_dense_call(call: DenseCall) -> None:
    """Say how dense attention is computed. ``backend.py`` does, so that this file needs no diffusers."""
    global _dense_call
    _dense_call = call


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: Tensor,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
    gqa: bool,
) -> Tensor:
    call = _dense_call
    if call is None:
        raise RuntimeError("dit_accel::attend was called before dit_accel_patches registered its backend")
    handle = find(int(layer))

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return call(handle, q, k, v, mask, scale, causal, gqa)

    if handle is None:
        return _as_promised(dense(query, key, value), query)
    run = handle.state.run
    reason, key_valid = _why_not(handle, query, key, value, mask, causal, gqa)
    if reason is not None:
        run.decline(handle.index, reason)
        out = dense(query, key, value)
        blended = getattr(run, "blended", None) if handle.state.thread is not None else None
        return _as_promised(out if blended is None else blended(out, value, handle.index), query)
    rule = handle.state.rule
    if rule is None:
        out = run.attend(query, key, value, layer=handle.index, scale=scale, key_valid=key_valid, dense=dense)
    else:
        out = rule.attend(run, Call(handle.index, query, key, value, scale, key_valid, dense))
    if out.shape != query.shape:
        raise RuntimeError(f"attend() of layer {handle.index} must return {tuple(query.shape)}, got {tuple(out.shape)}")
    return _as_promised(out, query)


def _as_promised(out: Tensor, query: Tensor) -> Tensor:
    """The dtype and layout that the fake kernel promised; under autocast dense attention returns another dtype."""
    return out.to(query.dtype).contiguous()


def _attend_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: Tensor,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
    gqa: bool,
) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


_op = torch.library.custom_op("dit_accel::attend", _attend, mutates_args=(), schema=_SCHEMA)
_op.register_fake(_attend_fake)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: Tensor,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
    gqa: bool,
) -> Tensor:
    """Attention of one layer, ``[B, S, H, D]`` in and out; ``layer`` is :attr:`LayerHandle.layer`."""
    return cast(Tensor, cast(Any, torch.ops.dit_accel.attend)(query, key, value, layer, mask, scale, causal, gqa))


def _why_not(
    handle: LayerHandle,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    gqa: bool,
) -> tuple[str | None, Tensor | None]:
    """Reason to stay dense, or ``None`` and the mask of valid keys ``[B, Sk]``.

    Control methods put further keys behind those of the sequence; whether they are taken is for the run to say.
    """
    if handle.state.thread is None:
        return "called outside a forward call of the transformer", None
    if causal:
        return "causal attention", None
    grouped = gqa or key.shape[2] != query.shape[2]
    if grouped and not (handle.state.rule is not None and handle.state.rule.grouped):
        return f"grouped heads: {query.shape[2]} query heads on {key.shape[2]} key heads", None
    fits = (query.shape[0], query.shape[3]) == (key.shape[0], key.shape[3]) and key.shape[1] >= query.shape[1]
    if not fits or key.shape != value.shape:
        return f"not self-attention: query {tuple(query.shape)}, key {tuple(key.shape)}", None
    if mask is None:
        return None, None
    batch, tokens = key.shape[:2]
    shape = tuple(mask.shape)
    if mask.dtype == torch.bool and shape in ((batch, 1, 1, tokens), (1, 1, 1, tokens)):
        return None, mask[:, 0, 0, :].expand(batch, tokens)
    # For F.scaled_dot_product_attention two dimensions are (queries, keys), for diffusers (batch, keys).
    if mask.dtype == torch.bool and shape == (batch, tokens) and not handle.sdpa:
        return None, mask
    row = handle.state.row
    if row is not None and mask.dtype == torch.bool and shape == (batch, 1, query.shape[1], tokens):
        return None, mask[:, 0, row, :]
    return f"attention mask of shape {shape} and {mask.dtype}; masks of valid keys [B, 1, 1, S] are supported", None
