"""Installing an attention run into a diffusers transformer, and taking it out without a trace.

Nothing is replaced on a class or in torch. A transformer gets a wrapped copy of the processor of each self-attention,
one pre-forward hook and one forward hook of :class:`torch.nn.Module`, and one listener in diffusers' hook registry that
wraps no ``forward``. Everything else of ours lives in ``module.__dict__["_dit_accel"]``, which is neither state nor
configuration.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dit_accel.adapter import Adapter, AttentionRun
from dit_accel.geometry import TokenGeometry
from dit_accel.logging import get_logger
from dit_accel_patches.backend import ensure_registered
from dit_accel_patches.callers import whereabouts
from dit_accel_patches.calls import make_rule
from dit_accel_patches.clock import Clock
from dit_accel_patches.context import add_hook, remove_hook
from dit_accel_patches.cross import CrossLayers, clean
from dit_accel_patches.handles import ForwardState
from dit_accel_patches.layers import Layer, find_layers
from dit_accel_patches.op import arm
from dit_accel_patches.parallel import update

__all__ = ["Installation", "install"]

_KEY = "_dit_accel"
_logger = get_logger("dit_accel.patches")


def install(module: nn.Module, adapter: Adapter, run: AttentionRun, *, pipe: Any | None = None) -> Installation:
    """Send the self-attention of a transformer to ``run``.

    Args:
        module: the transformer, compiled or not.
        adapter: which modules are self-attention, and how the geometry is read.
        run: receives every call, until :meth:`Installation.undo`.
        pipe: the pipeline around it; its scheduler then tells the step where the pipeline does not say it itself.

    Raises:
        RuntimeError: the transformer is accelerated already.
        ValueError: it cannot be accelerated, or has no self-attention where the adapter looks for it.
    """
    module = getattr(module, "_orig_mod", module)
    refused = getattr(adapter, "refused", {}).get(type(module).__name__)
    if refused is not None:
        raise ValueError(f"{type(module).__name__} cannot be accelerated: {refused}")
    existing = module.__dict__.get(_KEY)
    if isinstance(existing, Installation):
        raise RuntimeError(f"{type(module).__name__} is accelerated already, by the {existing.adapter.name} adapter")
    if existing is not None:
        _clean(module)
    return Installation(module, adapter, run, pipe)


class Installation:
    """An attention run inside a transformer.

    Attributes:
        adapter: the adapter that was used.
        run: receives the calls.
        layers: path of each self-attention module; the position is the layer number.
        owner: what lives as long as this does; the core keeps its handle here.
    """

    def __init__(self, module: nn.Module, adapter: Adapter, run: AttentionRun, pipe: Any | None) -> None:
        found = list(find_layers(module, adapter))
        if not found:
            places = ", ".join(f"{b}.*.{a}" for b in adapter.blocks for a in adapter.attention)
            raise ValueError(
                f"{type(module).__name__} has no self-attention that could be accelerated: none at {places}, where the "
                f"{adapter.name} adapter looks for it"
            )
        self.adapter = adapter
        self.run = run
        self.layers: tuple[str, ...] = tuple(path for path, _ in found)
        self.owner: object = None
        self._module: nn.Module | None = module
        self._state = ForwardState(run, make_rule(getattr(adapter, "calls", "")))
        self._clock = Clock(pipe)
        self._warned: set[str] = set()
        self._lock = threading.Lock()
        self._runner: threading.Thread | None = None
        self._used = False
        member = ensure_registered()
        self._records = [Layer(path, layer, index, self._state, member) for index, (path, layer) in enumerate(found)]
        # A function of this module, not a method of ours: a copied transformer copies its hooks.
        self._hook = add_hook(module, _end_of_run)
        module.__dict__[_KEY] = self
        module.register_forward_pre_hook(_before_forward, with_kwargs=True)
        # always_call: a forward call that raises must not leave the transformer marked as busy.
        module.register_forward_hook(_after_forward, always_call=True)
        self._cross: CrossLayers | None = None
        try:
            for record in self._records:
                record.wrap()
            if getattr(run, "wants_cross", False):
                self._cross = CrossLayers(module, adapter, self.layers, self._state)
        except BaseException:
            self.undo()
            raise

    @property
    def skipped(self) -> dict[str, str]:
        """Layers that are left to the model, with the reason."""
        return {record.path: record.skipped for record in self._records if record.skipped is not None}

    def check(self) -> list[str]:
        """Repair what others changed since installation; return what it was, and warn about it once.

        Runs by itself at the start of every forward call.
        """
        found: dict[str, int] = {}
        for record in self._records:
            change = record.repair()
            if change is not None:
                found[change] = found.get(change, 0) + 1
        messages = [f"{change} ({count} of {len(self._records)} layers)" for change, count in found.items()]
        for message in messages:
            self._warn(message)
        return messages

    def undo(self) -> None:
        """Restore every object that was there before. Calling it again does nothing."""
        module, self._module = self._module, None
        if module is None:
            return
        for record in self._records:
            record.restore()
        if self._cross is not None:
            self._cross.undo()
        if module.__dict__.get(_KEY) is self:
            _clean(module)
        self.end_run()

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Start of a forward call of the transformer."""
        if self._claim(module):
            self.end_run(keep_turn=True)
        self.check()
        geometry = self._geometry(module, args, kwargs)
        places = (module, getattr(module.get_submodule(self.layers[0]), "processor", None))
        self._state.spread = update(self._state.spread, places, module, args, kwargs, geometry)
        if self._state.spread is None and getattr(self.run, "share", None) is not None:
            self.run.spread(None)  # type: ignore[attr-defined]  # runs that know of several processes
        step, fresh = self._clock.tick(module, args, kwargs, self._hook.context, geometry)
        if fresh:
            self._forget_run()
        self._used = True
        rule = self._state.rule
        if rule is not None:
            geometry = rule.begin(geometry, step)
        outer = getattr(self.adapter, "outer_mask", False)
        self._state.row = None if not outer or isinstance(geometry, str) else geometry.prefix
        self.run.begin_forward(geometry, step)
        for record in self._records:
            if record.skipped is not None:
                self.run.decline(record.index, record.skipped)
        arm(self._state)

    def end(self, *, cut: bool) -> None:
        """End of a forward call; ``cut`` says that it raised, and with it its run."""
        if self._state.thread is not threading.current_thread():
            return
        self._state.thread = None
        self._state.disarm()
        if cut:
            self.end_run()

    def end_run(self, *, keep_turn: bool = False) -> None:
        """The run is over: free what belongs to it, and begin the next call from step 0."""
        if not keep_turn:
            self._runner = None
        self._clock.reset()
        self._forget_run()

    def _forget_run(self) -> None:
        if self._used:
            self._used = False
            self.run.reset()
            if self._state.rule is not None:
                self._state.rule.forget()

    def _claim(self, module: nn.Module) -> bool:
        """Mark the transformer as busy: a run is one denoising loop, and two at once would mix their steps.

        Returns whether the call before was cut short without a word, as Ctrl-C does.
        """
        with self._lock:
            claimed, here = self._state.thread, threading.current_thread()
            other = claimed or self._runner
            place = None
            if other is not None and other is not here:
                place = whereabouts(other, module, claimed=claimed is not None)
            if other is not None and place is not None:
                raise RuntimeError(
                    f"thread {here.name} called a transformer that dit_accel accelerates while thread {other.name} "
                    f"is {place}; run them one after the other or give each thread a transformer of its own"
                )
            self._state.thread = self._runner = here
            return claimed is not None

    def _geometry(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
        try:
            return self.adapter.geometry(module, args, kwargs)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            reason = f"the {self.adapter.name} adapter could not read the geometry: {error}"
            self._warn(reason)
            return reason

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            _logger.warning("%s", message)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy of the transformer is not accelerated: two transformers must not share one run.
        return _Copied, ()


class _Copied:
    """What a copied or unpickled transformer finds in place of its installation."""


@torch.compiler.disable
def _before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    installation = module.__dict__.get(_KEY)
    if isinstance(installation, Installation):
        installation.begin(module, args, kwargs)
        return
    _clean(module)
    _logger.warning(
        "%s is a copy of an accelerated transformer and runs dense; enable dit_accel on the copy", type(module).__name__
    )


@torch.compiler.disable
def _after_forward(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    installation = module.__dict__.get(_KEY)
    if isinstance(installation, Installation):
        installation.end(cut=output is None)


def _end_of_run(module: nn.Module) -> None:
    installation = module.__dict__.get(_KEY)
    if isinstance(installation, Installation):
        installation.end_run()


def _clean(module: nn.Module) -> None:
    """Remove our hooks and our attribute from a module, whoever put other hooks beside them."""
    module.__dict__.pop(_KEY, None)
    clean(module)
    hooks: Any
    for hooks, ours, companions in (
        (module._forward_pre_hooks, _before_forward, (module._forward_pre_hooks_with_kwargs,)),
        (
            module._forward_hooks,
            _after_forward,
            (module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
        ),
    ):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]
            for companion in companions:
                companion.pop(key, None)
    remove_hook(module)
