"""The seam for transformers that are spread over processes: which attention heads a call has, and plans for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from dit_accel.method import Method
    from dit_accel.plan import Plan
    from dit_accel.planner import Planner

__all__ = ["HeadShare"]


class HeadShare(Protocol):
    """The heads that this process computes. What it gathers, all processes must ask for at the same call."""

    @property
    def total(self) -> int:
        """Heads of the model."""

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """All heads in their own order, from those of each process."""

    def why_not(self, method: Method, controlled: bool) -> str | None:
        """Reason why a method cannot be shared, or ``None``; ``controlled`` says that densities are chosen by head."""

    def planner(self, known: Planner) -> Planner:
        """What makes plans of the heads of this process as one process would, in place of ``known``."""

    def static(self, known: Any) -> Any:
        """A static plan cut to the heads of this process, in place of ``known``."""

    def kept(self, method: Method, plan: Plan, memory: Any) -> Plan:
        """The plan that later calls use: this one, or that of other heads whose work is even over the processes."""
