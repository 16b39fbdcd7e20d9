"""The seam between the engine and a model library.

An :class:`Adapter` is data: it says for one family of transformers which modules are self-attention and how to read the
token geometry from the arguments of a forward call. The code that joins adapters to a library (diffusers, ComfyUI) lives
outside the core and talks to it through :class:`AttentionRun`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from dit_accel.geometry import TokenGeometry

__all__ = ["Adapter", "AttentionRun", "DenseFn", "GeometryFn", "StepInfo"]

#: Dense attention as the user configured it: ``(q, k, v) -> out``, all ``[B, S, H, D]``.
DenseFn = Callable[[Tensor, Tensor, Tensor], Tensor]

#: Reads the geometry from ``(transformer, args, kwargs)`` of a forward call; a string is the reason to stay dense.
GeometryFn = Callable[[nn.Module, Sequence[Any], Mapping[str, Any]], "TokenGeometry | str"]


@dataclass(frozen=True)
class Adapter:
    """How to accelerate one family of transformers.

    Attributes:
        name: short family name, for example ``"wan"``.
        models: transformer class names that it serves.
        blocks: names of the ``ModuleList`` children of the transformer that hold the blocks.
        attention: names of the self-attention module inside a block.
        geometry: reads the token geometry of a forward call.
        cross: names of the cross-attention module inside a block, for methods that override its output.
        task: ``"video"`` or ``"image"``.
        note: one line for ``dit-accel models``.
    """

    name: str
    models: tuple[str, ...]
    blocks: tuple[str, ...]
    attention: tuple[str, ...]
    geometry: GeometryFn
    task: str = "video"
    note: str = ""
    cross: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepInfo:
    """Where a forward call stands in the denoising loop. Unknown parts are ``None``.

    Attributes:
        step: 0-based index of the denoising step.
        steps: number of denoising steps of the run.
        progress: fraction of the schedule that lies behind, in ``[0, 1)``.
        branch: guidance branch, for example ``"cond"`` or ``"uncond"``.
        timestep: timestep as the model gets it, where it could be read without a device synchronisation.
        source: who told: ``"context"``, ``"scheduler"``, ``"timestep"`` or ``"calls"``.
    """

    step: int | None = None
    steps: int | None = None
    progress: float | None = None
    branch: str = "cond"
    timestep: float | None = None
    source: str = "calls"


class AttentionRun(Protocol):
    """What a library integration calls. One object per accelerated transformer."""

    def begin_forward(self, geometry: TokenGeometry | str, step: StepInfo) -> None:
        """Start of a forward call of the transformer. A string geometry is a reason to stay dense."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int,
        scale: float | None,
        key_valid: Tensor | None,
        dense: DenseFn,
    ) -> Tensor:
        """Self-attention of one layer. ``[B, S, H, D]`` in and out; ``key_valid`` is bool ``[B, Sk]`` or ``None``.

        Keys may be more than queries: those behind the tokens of the geometry are a control method's own.
        """

    @property
    def wants_cross(self) -> bool:
        """Whether outputs of cross-attention go through :meth:`cross`."""

    def cross(self, layer: int, output: Tensor) -> Tensor:
        """What stands for the cross-attention output ``[B, S, C]`` of the block of a layer."""

    def decline(self, layer: int, reason: str) -> None:
        """Count a call that the integration sent to dense attention itself."""

    def reset(self) -> None:
        """End of a run: forget plans that belong to it."""
