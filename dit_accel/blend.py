"""Blending the output of chosen heads with their values: guidance by perturbed attention.

SoftPAG (HeadHunter, arXiv 2506.10978) perturbs the attention map ``A`` of a head to ``(1 - u) A + u I``. Since ``I V = V``,
its output is ``(1 - u) O + u V``, whatever kernel computed ``O``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import cast

import torch
from torch import Tensor

from dit_accel.adapter import StepInfo

__all__ = ["Blend"]

Heads = Mapping[int, Collection[int] | None]


class Blend:
    """``O <- (1 - u) O + u V`` on chosen heads, until :meth:`remove`.

    Args:
        u: weight of the values, from 0 (nothing changes) to 1 (the values alone).
        heads: heads by layer number, ``None`` for all of a layer; or ``None`` for all layers.
        steps: denoising steps at which it applies, such as ``range(5, 20)``; ``None`` for all. Calls whose step is unknown
            are then left alone.
        branch: guidance branch that it applies to, such as ``"uncond"``; ``None`` for all.

    Raises:
        ValueError: ``u`` is not between 0 and 1, or a layer or head number is negative.
    """

    def __init__(
        self,
        u: float,
        heads: Heads | None = None,
        *,
        steps: Collection[int] | None = None,
        branch: str | None = None,
    ) -> None:
        if isinstance(u, bool) or not isinstance(u, int | float) or not 0 <= u <= 1:
            raise ValueError(f"u must be a number between 0 and 1, got {u!r}")
        if heads is not None and not isinstance(heads, Mapping):
            raise ValueError(f"heads must map layer numbers to lists of heads, got {heads!r}")
        self.u = float(u)
        self.heads = None if heads is None else {layer: _numbers(layer, found) for layer, found in heads.items()}
        self.steps = steps
        self.branch = branch
        self._weights: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}
        self._remove: list[Callable[[Blend], None]] = []

    def check(self, layers: int) -> None:
        """Check layer numbers against a model of so many layers.

        Raises:
            ValueError: for a layer that does not exist.
        """
        bad = [layer for layer in self.heads or () if layer >= layers]
        if bad:
            raise ValueError(f"heads: layers must lie in 0..{layers - 1}, got {bad}")

    def on_remove(self, forget: Callable[[Blend], None]) -> None:
        """Note who has to forget this blend when it is removed."""
        self._remove.append(forget)

    def remove(self) -> None:
        """Take it away again. Calling it twice does nothing."""
        for forget in self._remove:
            forget(self)
        self._remove.clear()

    def applies(self, layer: int, step: StepInfo) -> bool:
        """Whether a call is blended."""
        if self.branch is not None and step.branch != self.branch:
            return False
        if self.steps is not None and (step.step is None or step.step not in self.steps):
            return False
        return self.heads is None or layer in self.heads

    def apply(self, out: Tensor, value: Tensor, layer: int) -> Tensor:
        """The blended output ``[B, S, H, D]``; ``value`` like it, with further tokens behind where a caller adds keys.

        Raises:
            ValueError: for a head that the layer does not have.
        """
        own = value[:, : out.shape[1]].to(out.dtype)
        return torch.lerp(out, own, self._weight(layer, out))

    def _weight(self, layer: int, out: Tensor) -> Tensor:
        """Weight of the values by head, ``[H, 1]``, filled on the device."""
        key = (layer, out.shape[2], out.device, out.dtype)
        if key not in self._weights:
            chosen = None if self.heads is None else self.heads[layer]
            if chosen is not None and any(head >= out.shape[2] for head in chosen):
                raise ValueError(f"heads of layer {layer} must lie in 0..{out.shape[2] - 1}, got {sorted(chosen)}")
            weight = torch.full(
                (out.shape[2], 1), self.u if chosen is None else 0.0, device=out.device, dtype=out.dtype
            )
            for head in chosen or ():
                weight[head].fill_(self.u)
            self._weights[key] = weight
        return self._weights[key]


def _numbers(layer: object, heads: object) -> frozenset[int] | None:
    ok = isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0
    if ok and heads is None:
        return None
    ok = ok and isinstance(heads, Collection) and not isinstance(heads, str)
    if not ok or any(isinstance(h, bool) or not isinstance(h, int) or h < 0 for h in cast("Collection[object]", heads)):
        raise ValueError(f"heads must map layer numbers to lists of heads, numbers from 0, got {layer!r}: {heads!r}")
    return frozenset(cast("Collection[int]", heads))
