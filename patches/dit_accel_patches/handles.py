"""Which layer is running: handles, the table that finds them by number, and the current one of a thread.

A compiled graph may not hold a Python integer per layer (each value would be compiled again), so a layer is named by a
0-dim CPU tensor. Whoever reads that tensor finds the Python side of the layer here.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dit_accel.adapter import AttentionRun
from dit_accel_patches.calls import CallRule
from dit_accel_patches.parallel import Spread

__all__ = ["TAGS", "ForwardState", "LayerHandle", "current", "enter", "find", "leave"]

# What a call does differs from step to step: inductor must not capture it into a CUDA graph. Versions of torch that do not
# know the tag capture no graph with an input on the CPU, as the layer's number is.
TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


#: ``(layer, query, key, value, scale) -> out`` or ``None``, ``[B, S, H, D]``.
Again = Callable[[int, Tensor, Tensor, Tensor, "float | None"], "Tensor | None"]


#: What has C make settled calls: takes the numbers of the layers, gives the module in C, or ``None``.
Arm = Callable[[Mapping[int, int]], Any]


def _nothing() -> None: ...


class ForwardState:
    """What the layers of one accelerated transformer share.

    Attributes:
        run: receives the calls.
        numbers: process-wide number of each layer by its index.
        again: what the run makes again without being asked, as ``ModelRun.again``; ``None`` where it has no such thing.
        arm: has C make such calls, as ``ModelRun.arm``; ``None`` where the run has no such thing.
        disarm: ends that.
        thread: the thread inside a forward call of the transformer, ``None`` between calls.
        rule: what the calls of this transformer need, ``None`` for nothing.
        row: the query whose row of a mask ``[B, 1, S, S]`` says which keys are valid, ``None`` where there is none.
        spread: how the transformer is spread over processes, ``None`` where it is not.
    """

    def __init__(self, run: AttentionRun, rule: CallRule | None = None) -> None:
        self.run = run
        self.numbers: dict[int, int] = {}
        self.again: Again | None = getattr(run, "again", None)
        self.arm: Arm | None = getattr(run, "arm", None)
        self.disarm: Callable[[], None] = getattr(run, "disarm", _nothing)
        self.thread: threading.Thread | None = None
        self.rule = rule
        self.row: int | None = None
        self.spread: Spread | None = None


class LayerHandle:
    """One attention layer of one accelerated transformer.

    Attributes:
        state: shared by the layers of the transformer.
        index: layer number within the transformer.
        number: the process-wide number inside ``layer``; never used twice.
        layer: 0-dim int64 CPU tensor, what compiled graphs take as an input.
        backend: diffusers' attention backend that the user had chosen for this layer, ``None`` for the active one.
        sdpa: whether the model calls ``F.scaled_dot_product_attention`` itself.
    """

    def __init__(self, state: ForwardState, index: int, backend: Any, sdpa: bool) -> None:
        self.state = state
        self.index = index
        self.number = next(_numbers)
        # The device is said: a default device of CUDA would make every read of it a synchronisation.
        self.layer = torch.tensor(self.number, dtype=torch.int64, device="cpu")
        self.backend = backend
        self.sdpa = sdpa
        _table[self.number] = self
        state.numbers[index] = self.number


class _Traced:
    """The handle that Dynamo sees while it traces; only one thread traces at a time."""

    def __init__(self) -> None:
        self.handle: LayerHandle | None = None


class _PerThread(threading.local):
    """The handle of eager code."""

    handle: LayerHandle | None = None


_numbers = itertools.count(1)  # 0 is that of a self-test
_table: WeakValueDictionary[int, LayerHandle] = WeakValueDictionary()
_traced = _Traced()
# Dynamo cannot guard reliably on a thread-local's attributes, so traced code has a slot of its own.
_per_thread = _PerThread()


def find(number: int) -> LayerHandle | None:
    """Return the handle with this number, ``None`` if its transformer is gone."""
    return _table.get(number)


def current() -> LayerHandle | None:
    """Return the handle of the attention processor that is running, if it is one of ours."""
    if torch.compiler.is_compiling():
        return _traced.handle
    # The second covers eager code that runs behind a graph break inside a compiled processor.
    return _per_thread.handle or _traced.handle


def enter(handle: LayerHandle) -> LayerHandle | None:
    """Make ``handle`` the current one and return the one before."""
    if torch.compiler.is_compiling():
        previous = _traced.handle
        _traced.handle = handle
    else:
        previous = _per_thread.handle
        _per_thread.handle = handle
    return previous


def leave(previous: LayerHandle | None) -> None:
    """Undo :func:`enter`."""
    if torch.compiler.is_compiling():
        _traced.handle = previous
    else:
        _per_thread.handle = previous
