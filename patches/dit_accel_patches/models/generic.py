"""Any other transformer of diffusers: no grid, the longest self-attention of a forward call on one axis.

Methods that score the data in the order of the tokens serve it; those that need frames, rows and columns stay dense and say
so. Text tokens are not told apart and may lose blocks like any others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dit_accel.geometry import TokenGeometry
from dit_accel_patches.calls import UNKNOWN_LENGTH
from dit_accel_patches.family import Family

__all__ = ["ADAPTER"]


def _geometry(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    return UNKNOWN_LENGTH


_LINEAR = "its self-attention is linear, there is no softmax to make sparse"

ADAPTER = Family(
    name="generic",
    # The base class of diffusers' models: classes that an adapter names come before it.
    models=("ModelMixin",),
    blocks=("*",),
    attention=("*",),
    geometry=_geometry,
    note="any other transformer of diffusers with attention processors, on one axis: for methods that need no grid",
    layout="one axis",
    dense="cross-attention, causal and grouped attention, sequences shorter than the longest",
    head_dim=(),
    calls="flat",
    refused={
        "AnyFlowFARTransformer3DModel": "its causal attention accepts the FlexAttention backend alone",
        "Kandinsky6SRTransformer3DModel": "its attention is sparse already, through FlexAttention that it names itself",
        "QwenImage21Transformer2DModel": "its attention is causal by segment, with a cache",
        "WanAnimate2Transformer3DModel": "its attention over a cache names FlexAttention and block masks itself",
        "SanaTransformer2DModel": _LINEAR,
        "SanaVideoTransformer3DModel": _LINEAR,
        "SanaWMTransformer3DModel": "most of its blocks are linear, and those with softmax call it outside a processor",
    },
)
