"""Orders of jobs that are made once for given lists and kept with them; see :mod:`.hopper_schedule`.

The lists of a plan are the same for many steps, and so is the order in which their query blocks are best done. The first
call with given lists sorts them, by a kernel of its own, into a tensor that lives as long as the lists do; later calls find
it and start the attention kernel alone. Such a tensor only says in which order jobs are done, so results do not depend on
it: if lists are changed in place, it is made anew merely to be a good order again.

Each stream has its own, which thus needs no event. What is captured into a CUDA graph is not computed yet: a call that is
captured uses what a call before the capture has made on any stream (``torch.cuda.graph`` waits for all of them first), and
otherwise sorts within the graph. What is recorded (:mod:`..replay`) uses what :func:`order_that_stays` has promised, and
otherwise sorts each time.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .._launch import is_recording, launch
from ..types import BlockLists
from .arguments import list_args
from .hopper_call import Jobs, jobs_of
from .hopper_specs import HopperConfig, hopper_config

__all__ = ["forget_orders", "order_of_jobs", "order_that_stays"]

_CALLS = 8  # orders that are kept of one tensor of lists: kinds of calls, and streams


class _Key(NamedTuple):
    jobs: Jobs
    has_partial: bool
    stream: int


class _Kept:
    """Orders of the lists whose tensor ``full`` this belongs to, and the versions of the lists they were made for."""

    def __init__(self) -> None:
        self.made: dict[_Key, tuple[tuple[int, ...], Tensor]] = {}
        self.pinned: list[Tensor] = []  # somebody has written down their addresses

    def pin(self, order: Tensor) -> Tensor:
        """The same order, kept as long as the lists are."""
        if not any(order is x for x in self.pinned):
            self.pinned.append(order)
        return order


_kept = WeakTensorKeyDictionary()
_lock = threading.Lock()


def forget_orders() -> None:
    """Forget all orders: those of lists in use are made anew. Orders in CUDA graphs and recordings stay."""
    with _lock:
        for kept in list(_kept.values()):
            kept.made.clear()


def order_of_jobs(lists: BlockLists, jobs: Jobs, counter: Tensor) -> tuple[Tensor, bool]:
    """The order of all jobs but the first ones, and whether it was there; otherwise a launch makes it.

    Args:
        lists: as the caller has them, on the current device.
        jobs: how many there are.
        counter: int32 ``[4]``; the launch sets the first to 0.

    Returns:
        int32 ``[jobs.total - jobs.first]`` or more, and whether nothing was launched.
    """
    if jobs.first >= jobs.total:
        return counter, True
    key, versions = _key(lists, jobs), _versions(lists)
    capturing, recording = _capturing(), is_recording()
    with _lock:
        kept = _kept.get(lists.full)
        found = None if kept is None else _find(kept, key, versions, capturing, recording)
    if found is not None:
        return found, True
    order = torch.empty(-(-(jobs.total - jobs.first) // 4) * 4, dtype=torch.int32, device=lists.full.device)
    _sort(lists, jobs, order, counter)
    if not capturing and not recording:
        with _lock:
            _keep(lists, key, versions, order)
    return order, False


def order_that_stays(q: Tensor, lists: BlockLists, config: HopperConfig | None = None) -> Tensor | None:
    """The order of jobs at an address that recorded calls may rely on as long as ``lists.full`` lives.

    Args:
        q: like the queries of these calls, ``[B, H, Sq, D]``.
        lists: lists of these calls.
        config: shape of a program, to tune or test.

    Returns:
        int32, one-dimensional; ``None`` if there is nothing to sort, or while a CUDA graph is captured.
    """
    jobs = jobs_of(q, hopper_config(q.shape[3]) if config is None else config)
    if jobs.first >= jobs.total or _capturing():
        return None
    with torch.cuda.device(q.device):
        order_of_jobs(lists, jobs, torch.empty(4, dtype=torch.int32, device=q.device))
        with _lock:
            kept = _kept.get(lists.full)
            found = None if kept is None else kept.made.get(_key(lists, jobs))
            return None if kept is None or found is None else kept.pin(found[1])


def _key(lists: BlockLists, jobs: Jobs) -> _Key:
    return _Key(jobs, lists.partial is not None, _current_stream(lists.full.device.index or 0))


def _current_stream(index: int) -> int:
    return torch._C._cuda_getCurrentRawStream(index)


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _versions(lists: BlockLists) -> tuple[int, ...]:
    """How often lengths were changed in place; of inference tensors nobody counts it, and the order only gets worse."""
    lengths = (lists.full,) if lists.partial is None else (lists.full, lists.partial)
    return tuple(0 if x.is_inference() else x._version for x in lengths)


def _find(kept: _Kept, key: _Key, versions: tuple[int, ...], capturing: bool, recording: bool) -> Tensor | None:
    """What serves a call now."""
    if capturing:
        # That of another stream will do: capturing has waited for it, and replays come later.
        made = [order for other, (_, order) in kept.made.items() if other[:2] == key[:2]]
        return kept.pin(made[-1]) if made else None
    seen, order = kept.made.get(key, (None, None))
    if order is None or (recording and not any(order is x for x in kept.pinned)):
        return None
    return order if seen == versions or recording else None


def _keep(lists: BlockLists, key: _Key, versions: tuple[int, ...], order: Tensor) -> None:
    kept = _kept.get(lists.full)
    if kept is None:
        kept = _kept[lists.full] = _Kept()
    if len(kept.made) >= _CALLS and key not in kept.made:
        kept.made.clear()
    kept.made[key] = versions, order


def _sort(lists: BlockLists, jobs: Jobs, order: Tensor, counter: Tensor) -> None:
    """Launch the kernel that sorts, on the current stream."""
    from .hopper_schedule import BLOCK, OTHERS, longest_first_kernel

    where: dict[str, Any] = list_args(lists)
    launch(longest_first_kernel, (max(1, -(-(jobs.total - jobs.first) // BLOCK)),))(
        where["full"],
        where["partial"],
        order,
        counter,
        jobs.first,
        jobs.total,
        jobs.blocks,
        jobs.heads,
        where["list_b"],
        where["list_h"],
        HAS_PARTIAL=lists.partial is not None,
        BLOCK=BLOCK,
        OTHERS=OTHERS,
        span=jobs.span,
        PDL=True,
        launch_pdl=True,
    )
