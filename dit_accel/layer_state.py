"""What a layer remembers between calls: its plan, and device-side signs that the plan has become old."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_accel.plan import Plan

__all__ = ["DeferredFlag", "LayerState", "MaskFlags"]


class DeferredFlag:
    """A bool of the device that the host reads one step later.

    On CUDA it is copied to pinned memory behind an event. By the time it is read, the work of a whole step has been queued
    behind it, so the device does not run dry; the host waits only if it is more than a step ahead, which keeps runs
    repeatable.

    Args:
        flag: 0-dim bool.
    """

    def __init__(self, flag: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if flag.device.type != "cuda":
            self._host = flag
            return
        self._host = torch.empty((), dtype=torch.bool, pin_memory=True)
        self._host.copy_(flag, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(flag.device))

    def read(self) -> bool:
        """The value, as it was when the flag was made."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._host)


class MaskFlags:
    """Comparisons of masks in one forward call: its layers share the mask, and those before shared theirs."""

    def __init__(self) -> None:
        # With the masks, lest their memory serves others while their addresses are known here.
        self._known: dict[Any, tuple[DeferredFlag, Tensor, Tensor]] = {}

    def clear(self) -> None:
        """Another forward call begins."""
        self._known.clear()

    def differ(self, now: Tensor, before: Tensor) -> DeferredFlag:
        """Whether two masks ``[B, S]`` differ."""
        if now.is_inference() or before.is_inference():  # they do not tell when they are written to
            return DeferredFlag((now != before).any())
        key = tuple([(x.data_ptr(), x._version, x.shape, x.stride()) for x in (now, before)])
        if key not in self._known:
            self._known[key] = DeferredFlag((now != before).any()), now, before
        return self._known[key][0]


@dataclass
class LayerState:
    """What a layer remembers for one guidance branch and batch size.

    Attributes:
        plan: the plan in force.
        planned_at: step at which it was made.
        first_at: step at which the first plan of the run was made.
        branch: guidance branch that it was made for.
        memory: what slots keep from one plan to the next.
        mean_query: mean query of the plan's step, float32 ``[B, H * D]``, where similarity is watched.
        key_valid: mask of valid keys that the plan was made with, bool ``[B, S]``.
        old: signs from the latest step that the plan has become old.
    """

    plan: Plan | None = None
    planned_at: int | None = None
    first_at: int | None = None
    branch: str = ""
    memory: dict[str, Any] = field(default_factory=dict)
    mean_query: Tensor | None = None
    key_valid: Tensor | None = None
    old: list[DeferredFlag] = field(default_factory=list)

    def forget_if_again(self, step: int | None, branch: str, *, follows: bool) -> None:
        """Drop a plan whose step comes again: the run that made it was interrupted.

        A step that comes twice is a new run only where the first plan was made; later on it is a second call of the same
        step, as solvers of second order make them. For a layer that follows, the plan of this very step is what it waits
        for.
        """
        if step is None or self.planned_at is None:
            return
        twice = step == self.planned_at == self.first_at and branch == self.branch and not follows
        if step < self.planned_at or twice:
            self.plan = self.planned_at = self.first_at = self.mean_query = self.key_valid = None
            self.memory.clear()
            self.old.clear()

    def keep(self, plan: Plan, step: int | None, branch: str, query: Tensor | None, key_valid: Tensor | None) -> None:
        """Put a new plan in force; ``query`` ``[B, H, S, D]`` is given where similarity is watched."""
        self.plan, self.planned_at, self.branch = plan, step, branch
        self.first_at = step if self.first_at is None else self.first_at
        self.mean_query = None if query is None else _mean(query)
        self.key_valid = key_valid
        self.old.clear()

    def has_turned(self) -> bool:
        """Whether the latest sparse step found the plan old."""
        return any([flag.read() for flag in self.old])

    def watch(
        self, query: Tensor, key_valid: Tensor | None, similar: float, branch: str, masks: MaskFlags | None = None
    ) -> None:
        """Compare the mean query and the mask of a call with those of the plan; :meth:`has_turned` tells a step later.

        Args:
            query: ``[B, H, S, D]``.
            key_valid: bool ``[B, S]``, or ``None``.
            similar: cosine of mean queries below which a plan is old, 0 for never.
            branch: guidance branch of the call.
            masks: what the layers before have compared in this forward call.
        """
        if branch != self.branch:
            return
        self.old.clear()
        if similar and self.mean_query is not None:
            cosine = torch.cosine_similarity(_mean(query), self.mean_query, dim=-1)
            self.old.append(DeferredFlag(cosine.amin() < similar))
        if key_valid is not None and self.key_valid is not None and key_valid is not self.key_valid:
            self.old.append((MaskFlags() if masks is None else masks).differ(key_valid, self.key_valid))


def _mean(query: Tensor) -> Tensor:
    """Mean over the tokens, all heads joined, float32 ``[B, H * D]``."""
    return query.mean(2, dtype=torch.float32).flatten(1)
