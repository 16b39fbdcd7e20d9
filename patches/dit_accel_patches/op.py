"""The custom operator through which every accelerated layer goes.

To a compiler it is one opaque node with the layer as a tensor, so one graph serves all layers. Its body is Python that
runs at run time: it finds the layer and its run, and decides per call. On NVIDIA GPUs a body in C stands before it, which
makes the calls that were armed when the forward call began (:mod:`dit_accel_kernels.native`) and hands it all others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from dit_accel.copies import in_one_piece
from dit_accel_patches.aligned import ALIGNMENT, tell_inductor
from dit_accel_patches.calls import Call
from dit_accel_patches.handles import TAGS, ForwardState, LayerHandle, find

__all__ = ["DenseCall", "arm", "attend", "leave", "set_dense_call", "take"]

#: Dense attention of a layer: ``(handle, q, k, v, mask, scale, causal, gqa, parallel_config) -> out``, all
#: ``[B, S, H, D]``; diffusers' parallel configuration where the call is one process's part of a sequence.
DenseCall = Callable[
    ["LayerHandle | None", Tensor, Tensor, Tensor, "Tensor | None", "float | None", bool, bool, Any], Tensor
]

_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor layer, Tensor? mask, float? scale, bool causal, bool gqa,"
    " bool spread=False) -> Tensor"
)
_dense_call: DenseCall | None = None
_native: list[Any] = []  # the operator's body in C and the library that registers it, once there is one


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
    spread: bool = False,
) -> Tensor:
    handle = find(int(layer))
    if mask is None and handle is not None and not causal:
        out = _again(handle.state, handle.index, query, key, value, scale)
        if out is not None:
            return out
    found = None if handle is None else handle.state.spread
    if not spread and handle is not None and found is not None:
        handle.state.run.decline(handle.index, "context parallelism: this attention is not spread over the processes")
        return _as_promised(_registered()(handle, query, key, value, mask, scale, causal, gqa, None), query)
    if not spread:
        return _as_promised(_here(handle, query, key, value, mask, scale, causal, gqa), query)
    if handle is None or found is None:
        raise RuntimeError("context parallel attention was called outside a forward call of its transformer")
    config = found.config

    def here(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
        return _here(handle, q, k, v, m, scale, causal, gqa)

    def as_is(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
        return _registered()(handle, q, k, v, m, scale, causal, gqa, config)

    return _as_promised(found.attend(query, key, value, mask, handle, here, as_is), query)


def arm(state: ForwardState) -> None:
    """Have C make the calls of the forward call that has begun, where nothing is left to decide about them."""
    rule = state.rule
    if state.arm is None or state.spread is not None or not (rule is None or rule.hands_over):
        return
    module = state.arm(state.numbers)
    if module is not None and not _native:
        take(module)


def take(module: Any, key: str = "CUDA") -> None:
    """Give the operator the body in C, which hands what is not armed to the one in Python."""
    module.set_body(_attend)
    # Beside the body for all devices, not in its place: the dispatcher prefers that of the device.
    library = torch.library.Library("dit_accel", "IMPL")
    library.impl("attend", module.attend, key)
    _native[:] = module.attend, library


def leave() -> None:
    """Undo :func:`take`."""
    if _native:
        _native.pop()._destroy()
        _native.clear()


def _again(
    state: ForwardState, index: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None
) -> Tensor | None:
    """Attention where the layer's run has nothing left to decide, ``None`` where it has to be asked."""
    again, rule = state.again, state.rule
    if again is None or state.spread is not None or state.thread is None or not (rule is None or rule.hands_over):
        return None
    return again(index, query, key, value, scale)


def _registered() -> DenseCall:
    if _dense_call is None:
        raise RuntimeError("dit_accel::attend was called before dit_accel_patches registered its backend")
    return _dense_call


def _here(
    handle: LayerHandle | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
    gqa: bool,
) -> Tensor:
    """Attention on a whole sequence."""
    call = _registered()

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return call(handle, q, k, v, mask, scale, causal, gqa, None)

    if handle is None:
        return dense(query, key, value)
    run = handle.state.run
    reason, key_valid = _why_not(handle, query, key, value, mask, causal, gqa)
    if reason is not None:
        run.decline(handle.index, reason)
        out = dense(query, key, value)
        # What is spread over processes is blended when the heads are together again.
        blends = handle.state.thread is not None and handle.state.spread is None
        blended = getattr(run, "blended", None) if blends else None
        return out if blended is None else blended(out, value, handle.index)
    rule = handle.state.rule
    if rule is None:
        out = run.attend(query, key, value, layer=handle.index, scale=scale, key_valid=key_valid, dense=dense)
    else:
        out = rule.attend(run, Call(handle.index, query, key, value, scale, key_valid, dense))
    if out.shape != query.shape:
        raise RuntimeError(f"attend() of layer {handle.index} must return {tuple(query.shape)}, got {tuple(out.shape)}")
    return out


def _as_promised(out: Tensor, query: Tensor) -> Tensor:
    """The dtype, layout and alignment that were promised; under autocast dense attention returns another dtype."""
    out = in_one_piece(out if out.dtype == query.dtype else out.to(query.dtype))
    return out if out.data_ptr() % ALIGNMENT == 0 else out.clone()


def _attend_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: Tensor,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
    gqa: bool,
    spread: bool = False,
) -> Tensor:
    tell_inductor(cast(Any, torch.ops.dit_accel.attend).default)
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


# Not torch.library.custom_op: what that puts around a call in Python costs 9 microseconds of 12, each time.
_library = torch.library.Library("dit_accel", "FRAGMENT")
_library.define("attend" + _SCHEMA, tags=TAGS)
_library.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("dit_accel::attend", _attend_fake, lib=_library)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: Tensor,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
    gqa: bool,
    spread: bool = False,
) -> Tensor:
    """Attention of one layer, ``[B, S, H, D]`` in and out; ``layer`` is :attr:`LayerHandle.layer`.

    With ``spread`` the tokens are this process's part of a sequence; see :mod:`dit_accel_patches.parallel`.
    """
    if _recorded(query):
        call = cast(Any, torch.ops.dit_accel.attend)
    else:
        call = _native[0] if _native else _attend
    return cast(Tensor, call(query, key, value, layer, mask, scale, causal, gqa, spread))


def _recorded(query: Tensor) -> bool:
    """Whether somebody writes down what is computed, or only its shapes: a compiler, a mode, a kind of tensor.

    Nobody else needs an operator, whose way from Python to Python costs the host as much as all that we decide.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return type(query) is not Tensor or query.is_meta


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
    ours, theirs = query.shape, key.shape
    grouped = gqa or theirs[2] != ours[2]
    if grouped and not (handle.state.rule is not None and handle.state.rule.grouped):
        return f"grouped heads: {ours[2]} query heads on {theirs[2]} key heads", None
    fits = ours == theirs or (ours[0] == theirs[0] and ours[3] == theirs[3] and theirs[1] >= ours[1])
    if not fits or theirs != value.shape:
        return f"not self-attention: query {tuple(ours)}, key {tuple(theirs)}", None
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
