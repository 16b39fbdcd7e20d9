"""Cosmos 3: queries of the generated tokens on keys of the prompt and of themselves, with grouped heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dit_accel.geometry import TokenGeometry
from dit_accel_patches.family import Family
from dit_accel_patches.readers import Call, PerTensor

__all__ = ["ADAPTER"]


def _first(indexes: Tensor) -> tuple[int, bool]:
    """Where the video begins, and whether it is in one piece."""
    table = indexes.detach().to("cpu")
    return int(table[0]), bool((table.diff() == 1).all())


_place = PerTensor(_first)


def _geometry(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    shapes = call.get("vision_token_shapes")
    if len(shapes) != 1:
        return f"{len(shapes)} videos or pictures stand in the sequence"
    frames, height, width = (int(size) for size in shapes[0])
    start, whole = _place(call.tensor("vision_sequence_indexes"))
    before = start - int(call.get("und_len"))
    after = int(call.get("sequence_length")) - start - frames * height * width
    if not whole or before < 0 or after < 0:
        return "the video tokens are not in one piece behind the prompt"
    return TokenGeometry((frames, height, width), prefix=before, suffix=after)


ADAPTER = Family(
    name="cosmos3",
    models=("Cosmos3OmniTransformer",),
    blocks=("layers",),
    attention=("self_attn",),
    geometry=_geometry,
    note="Cosmos 3 with one video or picture; sound and actions are exact",
    layout="video (sound and actions behind); keys prompt | video",
    dense="causal attention of the prompt",
    calls="keys_in_front",
)
