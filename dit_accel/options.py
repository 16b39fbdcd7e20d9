"""The keywords of :func:`dit_accel.enable` that are fields of a method, with their types, for editors and type checkers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

__all__ = ["MethodOptions"]


class MethodOptions(TypedDict, total=False):
    """Fields of :class:`~dit_accel.Method`, as :func:`dit_accel.enable` takes them; see there for what they mean."""

    order: str | Sequence[str]
    order_choice: str
    score: str
    select: str
    density: float | tuple[float, float] | None
    compensate: str
    block_q: int
    block_k: int
    hopper_blocks: tuple[int, int] | None
    pictures: Mapping[str, Any] | tuple[tuple[str, Any], ...]
    warmup: float
    end: float
    refresh: float | Sequence[float]
    dense_share: float
    reuse: str | Sequence[str]
    dense_every: int
    logit_scale: str
    cross_attention: str
    dense_layers: int | Sequence[int]
    branches: str
    static: bool
    static_share: float
    window: int | tuple[int, ...] | None
    stride: int | tuple[int, ...]
    dilation: int | tuple[int, ...]
    causal: bool | tuple[bool, ...]
    precision: str
    name: str
    summary: str
    paper: str | None
