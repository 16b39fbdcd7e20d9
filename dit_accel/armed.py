"""Settled calls of one forward call in the hands of a piece of C, which runs none of our Python.

Whether such a call may be made again is asked once, when the forward call of the transformer begins: what decides about it
changes between forward calls, or by a call of the layer that goes the usual way, and that one ends it for the layer. The C
asks at each call what can differ from call to call: layout, scale, who watches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dit_accel.replayed import recorded, switched_off

if TYPE_CHECKING:
    from dit_accel.runtime import ModelRun
    from dit_accel.settled import Settled

__all__ = ["Armed"]


class Armed:
    """What one run has given to the module in C; nothing between its forward calls."""

    def __init__(self) -> None:
        self._now: list[tuple[int, int, Any, Settled]] = []
        self._step: int | None = None
        self._module: Any = None
        self._quiet: tuple[list[Any], ...] = ()

    def arm(self, run: ModelRun, numbers: Mapping[int, int]) -> Any | None:
        """Arm the layers whose calls are settled; the module in C, ``None`` if nothing was armed.

        Args:
            run: whose forward call begins.
            numbers: process-wide number of each layer by its index.
        """
        self.disarm(run)
        if switched_off() or run._cross.wanted:
            return None  # what stands for the cross-attention is asked in the middle of a forward call
        if run.share is not None or run.recorder is not None or run.observer is not None or run.blends:
            return None
        from dit_accel_kernels.native import launch_hooks  # not before it is used: importing dit_accel must be quick

        module = self._module = _module()
        if module is None:
            return None
        quiet = (*launch_hooks(), run.blends)
        if any(quiet):
            return None
        if self._quiet and [id(x) for x in quiet] != [id(x) for x in self._quiet]:
            run._settled.clear()  # what is known of them would ask other lists
        self._quiet = quiet
        branch, settled, self._step = run._step.branch, run._settled, run._step.step
        for layer, number in numbers.items():
            found = settled.get((branch, layer))
            ready = None if found is None else found.armed(run, module, quiet)
            if found is None or ready is None:
                continue
            module.arm(number, *ready)
            self._now.append((number, layer, ready[0], found))
        return module if self._now else None

    def disarm(self, run: ModelRun | None) -> None:
        """Take everything back, and count it; a run of ``None`` is over."""
        now, self._now = self._now, []
        for number, layer, call, found in now:
            calls = self._module.disarm(number, call)
            if calls and run is not None:
                found.count(run, layer, self._step, calls)

    def __del__(self) -> None:
        self.disarm(None)

    def __deepcopy__(self, memo: Any) -> Armed:
        return Armed()

    def __reduce__(self) -> tuple[type[Armed], tuple[()]]:
        return Armed, ()


def _module() -> Any | None:
    """The module in C, where it was or can be made now."""
    import torch

    from dit_accel_kernels import native

    # Its self-test waits for the device, and would not see what a mode sees in its place.
    if not native.is_made() and (recorded() or torch.cuda.is_current_stream_capturing()):
        return None
    return native.native()
