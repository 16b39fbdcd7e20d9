"""Listening to what a pipeline says about its denoising loop, through diffusers' hook registry.

``transformer.cache_context("cond", step_index=...)`` writes to every ``StateManager`` of a stateful hook, and the end of
a pipeline call resets stateful hooks. Our hook takes part in both and in nothing else: it stands in front of the chain
and wraps no ``forward``. So there is nothing to unwind, and ``HookRegistry.remove_hook``, which loses a neighbour's
wrapper when hooks are removed in another order than last in first out, never meets it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import nn

__all__ = ["HOOK", "ContextHook", "add_hook", "remove_hook"]

#: Name of our hook in the registry of a transformer.
HOOK = "dit_accel"


class ContextHook:
    """Keeps the latest ``CacheContext`` of one transformer and passes the end of a run on.

    Args:
        end_of_run: called with the transformer when a pipeline is done with it.
    """

    _is_stateful = True

    def __init__(self, end_of_run: Callable[[nn.Module], None]) -> None:
        from diffusers.hooks.hooks import StateManager

        self.fn_ref: Any = None
        self.manager = StateManager(object)
        self._named: Any = None
        self._end_of_run = end_of_run

    @property
    def context(self) -> Any:
        """The ``CacheContext`` of the call, ``None`` outside one."""
        return getattr(self.manager, "_context", None) or self._named

    def _set_context(self, module: nn.Module, name: str | None = None) -> nn.Module:
        """How diffusers before 0.40 says the branch, and nothing more."""
        self._named = None if name is None else SimpleNamespace(name=name)
        return module

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Called by the pipeline when it is done."""
        self._end_of_run(module)
        return module

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:
        """Called if somebody else takes the hook out."""
        return module


def add_hook(module: nn.Module, end_of_run: Callable[[nn.Module], None]) -> ContextHook:
    """Put a hook in front of the hooks of ``module``, without touching its ``forward``."""
    from diffusers.hooks.hooks import HookFunctionReference, HookRegistry

    registry = HookRegistry.check_if_exists_or_initialize(module)
    hook = ContextHook(end_of_run)
    hook.fn_ref = HookFunctionReference()
    first = registry._fn_refs[0] if registry._fn_refs else None
    # Only read if somebody else removes the hook: then the hook behind it gets the forward that it has already.
    hook.fn_ref.forward = module.forward if first is None else (first.original_forward or first.forward)
    registry.hooks[HOOK] = hook
    registry._hook_order.insert(0, HOOK)
    registry._fn_refs.insert(0, hook.fn_ref)
    _forget_children(registry)
    return hook


def remove_hook(module: nn.Module) -> None:
    """Take our hook out of the registry of ``module`` if it is there, and an empty registry with it."""
    registry = module.__dict__.get("_diffusers_hook")
    if registry is None or HOOK not in registry.hooks:
        return
    index = registry._hook_order.index(HOOK)
    del registry.hooks[HOOK], registry._hook_order[index], registry._fn_refs[index]
    _forget_children(registry)
    if not registry.hooks:
        del module.__dict__["_diffusers_hook"]


def _forget_children(registry: Any) -> None:
    """Registries remember which modules below them have one; versions before that had nothing to forget."""
    forget = getattr(registry, "invalidate_child_registries_cache", None)
    if forget is not None:
        forget()
