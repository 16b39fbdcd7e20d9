"""FLUX.1: one sequence of text tokens, image tokens and, in Kontext, the tokens of a reference image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from dit_accel.geometry import TokenGeometry
from dit_accel_patches.arguments import argument
from dit_accel_patches.family import Family, Size

__all__ = ["ADAPTER"]

# A pipeline passes the same tensor of ids in every step, so the device is asked once per run.
_grids: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _geometry(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    ids = argument(module, args, kwargs, "img_ids")
    text = argument(module, args, kwargs, "encoder_hidden_states")
    if not isinstance(ids, Tensor) or not isinstance(text, Tensor):
        return "img_ids and encoder_hidden_states must be tensors"
    grid = _grids.get(ids)
    if grid is None:
        grid = _grids[ids] = _read_grid(ids)
    if isinstance(grid, str):
        return grid
    height, width, references = grid
    return TokenGeometry(grid=(1, height, width), prefix=text.shape[1], suffix=references)


def _read_grid(ids: Tensor) -> tuple[int, int, int] | str:
    """Rows, columns and number of reference tokens from ``img_ids [S, 3]``: which image, row, column."""
    table = ids.detach().to("cpu")
    table = table[0] if table.ndim == 3 else table
    if table.ndim != 2 or table.shape[1] != 3 or len(table) == 0:
        return f"img_ids must be [S, 3], got {tuple(ids.shape)}"
    # Lengths of the first runs, not the largest ids: in bfloat16 ids above 256 are rounded.
    image = _leading(table[:, 0])
    width = _leading(table[:image, 1])
    height = image // width
    rows, columns = table[:image, 1], table[:image, 2]
    if height * width != image:
        return f"img_ids of {image} image tokens do not fill rows of {width}"
    rows, columns = rows.view(height, width), columns.view(height, width)
    if not bool((rows == rows[:, :1]).all() and (columns == columns[:1]).all()):
        return "img_ids are not in raster order"
    return height, width, len(table) - image


def _leading(values: Tensor) -> int:
    """How many values from the front equal the first."""
    other = (values != values[0]).nonzero()
    return int(other[0]) if len(other) else len(values)


ADAPTER = Family(
    name="flux",
    models=("FluxTransformer2DModel",),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    attention=("attn",),
    geometry=_geometry,
    task="image",
    note="FLUX.1 text to image, Kontext, Fill, Control and img2img",
    layout="text | picture (references behind)",
    dense="blocks with an IP-Adapter",
    sizes=(
        Size("1024×1024", (1, 64, 64), 512),
        Size("Kontext, 1024×1024", (1, 64, 64), 4608),
        Size("2048×2048", (1, 128, 128), 512),
    ),
)
