"""Who calls a transformer, read from the stack: the pipeline that is running, and what another thread is at.

Runs are told apart by their steps, not by their threads, so that a loop may hop from thread to thread as servers let
generators do. That leaves one question, asked only where the thread changes: is the other one still at it? Its stack tells,
and unlike a mark it is never stale: Ctrl-C passes by the hooks of torch.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

from torch import nn

__all__ = ["calling_pipeline", "whereabouts"]


def calling_pipeline(module: nn.Module) -> Any:
    """The pipeline in whose ``__call__`` this code runs for a transformer, ``None`` where there is none.

    Another than the one that was accelerated may share the transformer, and only it has the scheduler that counts.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _runs(frame, module):
            return _self(frame)
        frame = frame.f_back
    return None


def whereabouts(thread: threading.Thread, module: nn.Module, *, claimed: bool) -> str | None:
    """Where a thread is with regard to a transformer, ``None`` if it is elsewhere or has ended.

    Args:
        thread: any but the current one.
        module: the transformer.
        claimed: whether the latest call of the transformer was this thread's and did not end.
    """
    frame = sys._current_frames().get(thread.ident or 0) if thread.is_alive() else None
    inside = running = False
    while frame is not None:
        inside = inside or _is(_self(frame), module)
        running = running or _runs(frame, module)
        frame = frame.f_back
    if claimed and inside:
        return "inside it"
    return "in the middle of a run of it" if running else None


def _runs(frame: FrameType, module: nn.Module) -> bool:
    """Whether a frame is the call of a pipeline that holds the transformer."""
    return frame.f_code.co_name == "__call__" and _holds(_self(frame), module)


def _self(frame: FrameType) -> Any:
    return frame.f_locals.get("self")


def _is(found: Any, module: nn.Module) -> bool:
    """Whether ``found`` is the transformer, compiled or not."""
    return found is module or getattr(found, "__dict__", {}).get("_modules", {}).get("_orig_mod") is module


def _holds(found: Any, module: nn.Module) -> bool:
    """Whether ``found`` is a pipeline with the transformer as a component."""
    if found is None or isinstance(found, nn.Module):
        return False
    return any(_is(value, module) for value in list(getattr(found, "__dict__", {}).values()))
