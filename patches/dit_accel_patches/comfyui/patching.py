"""Putting a session into a ComfyUI model patcher, and taking it out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dit_accel.static_plan import Recorder, StaticPlan
from dit_accel_patches.comfyui.families import find_family
from dit_accel_patches.comfyui.override import (
    FORWARD,
    OVERRIDE,
    install,
    session_of_override,
    without_session,
)
from dit_accel_patches.comfyui.schedule import Window
from dit_accel_patches.comfyui.session import Session
from dit_accel_patches.comfyui.settings import Settings

__all__ = ["KEY", "accelerate", "decelerate", "session_of"]

#: Our name among a model's wrappers and callbacks.
KEY = "dit_accel"
_WRAPPER = ("WrappersMP", "DIFFUSION_MODEL", "diffusion_model")
_PREPARE = ("CallbacksMP", "ON_PREPARE_STATE", "on_prepare_state")
_CLEANUP = ("CallbacksMP", "ON_CLEANUP", "on_cleanup")


def _kind(place: tuple[str, str, str]) -> str:
    """ComfyUI's name of a kind of wrapper or callback; the one of 0.3.64 where ComfyUI is absent."""
    try:
        import comfy.patcher_extension as extension
    except ImportError:
        return place[2]
    return str(getattr(getattr(extension, place[0]), place[1], place[2]))


def accelerate(
    model: Any,
    settings: Settings,
    *,
    plan: StaticPlan | None = None,
    recorder: Recorder | None = None,
    verbose: bool = False,
) -> Any:
    """A clone of a model patcher whose self-attention is sparse. An acceleration that was there is replaced.

    Raises:
        ValueError: the model is of no known family, a static method has no plan, or the plan is of another model.
    """
    diffusion = model.get_model_object("diffusion_model")
    family = find_family(diffusion)
    if isinstance(family, str):
        raise ValueError(f"{family}. Remove the node, or set dense_if_unsupported to keep this model dense.")
    if settings.build().static and plan is None and recorder is None:
        raise ValueError(
            f"method {settings.method!r} needs a profile: run the Calibrate node once for this model, size and number of "
            "steps and connect its profile, or choose another method"
        )
    if plan is not None and plan.model not in (type(diffusion).__name__, *family.twins):
        raise ValueError(
            f"the profile was made for {plan.model}, this model is {type(diffusion).__name__}; "
            "load the profile of this model or calibrate again"
        )
    window = Window.of(model.get_model_object("model_sampling"), settings.start_percent, settings.end_percent)
    session = Session(settings, family, window, diffusion, plan=plan, recorder=recorder, verbose=verbose)
    total = sum(family.counts(diffusion))
    beyond = [block for block in settings.dense_blocks if total and block >= total]
    if beyond:
        raise ValueError(f"dense_blocks names {beyond[0]}, but {session.model} has the blocks 0 to {total - 1}")
    clone = decelerate(model)
    install(session, clone.model_options.setdefault("transformer_options", {}))
    clone.add_wrapper_with_key(_kind(_WRAPPER), KEY, _wrapper(session))
    clone.add_callback_with_key(_kind(_PREPARE), KEY, _prepare(session))
    clone.add_callback_with_key(_kind(_CLEANUP), KEY, _cleanup(session))
    return clone


def decelerate(model: Any) -> Any:
    """A clone of a model patcher without us; what others installed stays."""
    clone = model.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    if session_of_override(options.get(OVERRIDE)) is not None:
        below = without_session(options.pop(OVERRIDE))
        if below is not None:
            options[OVERRIDE] = below
    for registered, place in ((clone.wrappers, _WRAPPER), (clone.callbacks, _PREPARE), (clone.callbacks, _CLEANUP)):
        registered.get(_kind(place), {}).pop(KEY, None)
    return clone


def session_of(model: Any) -> Session:
    """The session of an accelerated model.

    Raises:
        ValueError: if the model is not accelerated.
    """
    for wrapper in getattr(model, "wrappers", {}).get(_kind(_WRAPPER), {}).get(KEY, ()):
        session = getattr(wrapper, "_dit_accel_session", None)
        if isinstance(session, Session):
            return session
    raise ValueError("this model is not accelerated: connect the output of Accelerate Attention (dit_accel)")


def _options(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The ``transformer_options`` of a forward call, wherever the model takes them."""
    given = kwargs.get("transformer_options")
    if isinstance(given, dict):
        return given
    for value in args:
        if isinstance(value, dict) and ("wrappers" in value or "sigmas" in value or OVERRIDE in value):
            return value
    return None


def _wrapper(session: Session) -> Callable[..., Any]:
    def begin(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]) -> None:
        install(session, options)  # the sampler's copy of the options, which callbacks of 0.3.64 cannot reach
        options[FORWARD] = session.begin_forward(model, args, kwargs, options)

    enter = torch.compiler.disable(begin)

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = _options(args, kwargs)
        if options is None:
            return executor(*args, **kwargs)
        outer = options.get(FORWARD)
        enter(executor.class_obj, args, kwargs, options)
        try:
            return executor(*args, **kwargs)
        finally:
            if outer is None:
                options.pop(FORWARD, None)
            else:
                options[FORWARD] = outer

    # The model below may be compiled; only this frame is not.
    outside = torch.compiler.disable(wrapper, recursive=False)
    outside._dit_accel_session = session
    return outside  # type: ignore[no-any-return]


def _prepare(session: Session) -> Callable[..., None]:
    def prepare(patcher: Any, timestep: Any, model_options: Any = None, *rest: Any) -> None:
        options = patcher.model_options if model_options is None else model_options
        install(session, options.setdefault("transformer_options", {}))

    return prepare


def _cleanup(session: Session) -> Callable[..., None]:
    def cleanup(patcher: Any, *rest: Any) -> None:
        session.end_run()

    return cleanup
