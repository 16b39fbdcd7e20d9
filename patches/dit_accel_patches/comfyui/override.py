"""The attention override: sends self-attention of the visual tokens to the run, everything else on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dit_accel.geometry import TokenGeometry
from dit_accel_patches.comfyui.call import Call, unwrapped
from dit_accel_patches.comfyui.masks import key_valid
from dit_accel_patches.comfyui.session import Forward, Session
from dit_accel_patches.comfyui.settings import PRECISIONS

__all__ = ["FORWARD", "OVERRIDE", "install", "make_override", "session_of_override", "without_session"]

#: Where ComfyUI looks for an override, in ``transformer_options``.
OVERRIDE = "optimized_attention_override"
#: Where the state of the current forward call travels.
FORWARD = "dit_accel_forward"
_SESSION = "_dit_accel_session"
_PREVIOUS = "_dit_accel_previous"

_Attention = Callable[..., Any]


def make_override(session: Session, previous: _Attention | None) -> _Attention:
    """An override in ComfyUI's form; calls that stay dense go to ``previous``, or to the function of the call.

    A closure, because ComfyUI copies model options deeply, functions excepted.
    """

    def override(func: _Attention, *args: Any, **kwargs: Any) -> Any:
        args = unwrapped(args)

        def dense() -> Any:
            return func(*args, **kwargs) if previous is None else previous(func, *args, **kwargs)

        options = kwargs.get("transformer_options") or {}
        forward = options.get(FORWARD)
        if not isinstance(forward, Forward) or forward.session is not session or forward.inside:
            return dense()
        call = Call.parse(args, kwargs)
        if call is None:
            return dense()
        forward.inside = True  # an override below that was put on top of ours must not come here again
        try:
            return _attend(session, forward, call, options, dense)
        finally:
            forward.inside = False

    outside: _Attention = torch.compiler.disable(override)
    setattr(outside, _SESSION, session)
    setattr(outside, _PREVIOUS, previous)
    return outside


def session_of_override(override: Any) -> Session | None:
    """The session of an override of ours, ``None`` for any other."""
    session = getattr(override, _SESSION, None)
    return session if isinstance(session, Session) else None


def without_session(override: Any) -> Any:
    """What lies below our overrides."""
    while session_of_override(override) is not None:
        override = getattr(override, _PREVIOUS)
    return override


def install(session: Session, options: dict[str, Any]) -> None:
    """Put the session's override on top of what is there; nothing changes if it is on top already."""
    current = options.get(OVERRIDE)
    if session_of_override(current) is session:
        return
    below = without_session(current)
    known = session.overrides.get(id(below))
    if known is None or known[0] is not below:
        known = session.overrides[id(below)] = (below, make_override(session, below))
    options[OVERRIDE] = known[1]


def _attend(
    session: Session, forward: Forward, call: Call, options: Mapping[str, Any], dense: Callable[[], Any]
) -> Any:
    """One call: sparse if it is self-attention of the visual tokens and nothing speaks against it."""
    heads_last = call.heads_last()
    if heads_last is None:
        return dense()  # cross-attention
    layout = forward.layout
    geometry = layout.geometry(call.tokens) if not isinstance(layout, str) else layout
    if geometry is None:
        return dense()  # text or sound alone
    reason = geometry if isinstance(geometry, str) else _unfit(call)
    if isinstance(geometry, str) or reason is not None:
        session.decline(str(reason))
        return dense()
    valid = _valid(forward, call)
    if isinstance(valid, str):
        session.decline(valid)
        return dense()
    return _run(session, forward, call, options, dense, geometry, heads_last, valid)


def _run(
    session: Session,
    forward: Forward,
    call: Call,
    options: Mapping[str, Any],
    dense: Callable[[], Any],
    geometry: TokenGeometry,
    heads_last: tuple[Tensor, Tensor, Tensor],
    valid: Tensor | None,
) -> Any:
    block, layer = forward.numbering.next(options)
    q, k, v = heads_last
    dtype = PRECISIONS[session.settings.precision]
    if dtype is not None:
        q, k, v = (x.to(dtype) for x in (q, k, v))
    run = session.run(geometry, forward, q)
    reason = "dense layer" if block in session.settings.dense_blocks else session.outside(forward.step)
    if reason is not None:
        run.decline(layer, reason)
        return dense()
    if session.verbose:
        session.say(logging.INFO, f"{session.model}: {geometry}, {q.shape[2]} heads of {q.shape[3]}, {q.dtype}")
    kept: list[Any] = []

    def as_configured(*_: Tensor) -> Tensor:
        kept.append(dense())
        return call.from_result(kept[0])

    out = run.attend(q, k, v, layer=layer, scale=call.scale, key_valid=valid, dense=as_configured)
    return kept[0] if kept else call.to_result(out.to(call.q.dtype))


def _unfit(call: Call) -> str | None:
    """Why a call cannot be sparse whatever its tokens, or ``None``."""
    if call.exact:
        return f"the model asks for float32 attention of {call.q.dtype} inputs"
    return None


def _valid(forward: Forward, call: Call) -> Tensor | str | None:
    """Which keys are seen; a mask is looked at once for all blocks of a forward call."""
    mask = call.mask
    if mask is None:
        return None
    known = forward.masks.get(id(mask))
    if known is None or known[0] is not mask:
        known = forward.masks[id(mask)] = (mask, key_valid(mask, call.q.shape[0], call.tokens))
    return known[1]
