"""Pieces of which the geometry functions of the adapters are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from dit_accel.geometry import TokenGeometry
from dit_accel_patches.arguments import argument

__all__ = ["Call", "PerTensor", "along", "ids_grid", "latent_grid", "token_count"]


class Call:
    """The arguments of a forward call, by name.

    Args:
        module: the transformer.
        args, kwargs: what its forward was called with.
    """

    def __init__(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.module = module
        self.config: Any = getattr(module, "config", None)
        self._args = args
        self._kwargs = kwargs

    def get(self, name: str) -> Any:
        """The argument ``name``, ``None`` if it was not given."""
        return argument(self.module, self._args, self._kwargs, name)

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name``.

        Raises:
            ValueError: if it is none.
        """
        value = self.get(name)
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
        return value


class PerTensor:
    """Remembers what was read from a tensor, as long as the tensor lives.

    A pipeline passes the same tensor in every step, so the device is asked once a run.
    """

    def __init__(self, read: Callable[[Tensor], Any]) -> None:
        self.read = read
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __call__(self, tensor: Tensor) -> Any:
        """What ``read`` says of ``tensor``."""
        found = self._known.get(tensor)
        if found is None:
            found = self._known[tensor] = self.read(tensor)
        return found


def latent_grid(latent: Tensor, *patch: int, axes: Sequence[int] | None = None) -> tuple[int, int, int]:
    """Frames, rows and columns in tokens of a latent ``[B, C, F, H, W]`` or ``[B, C, H, W]``.

    Args:
        latent: what the transformer was called with.
        patch: patch size of each axis, as many as there are axes.
        axes: the axes of frames, rows and columns; by default all behind the first two.

    Raises:
        ValueError: if the latent has another number of axes.
    """
    places = tuple(range(2, 2 + len(patch))) if axes is None else tuple(axes)
    if latent.ndim != len(patch) + 2:
        raise ValueError(f"hidden_states must have {len(patch) + 2} axes, got {tuple(latent.shape)}")
    sizes = [latent.shape[axis] // size for axis, size in zip(places, patch, strict=True)]
    frames, height, width = [1] * (3 - len(sizes)) + sizes
    return frames, height, width


def token_count(*streams: Tensor | None) -> int:
    """Tokens of streams ``[B, S, C]``; ``None`` has none."""
    return sum(stream.shape[1] for stream in streams if stream is not None)


def along(values: Tensor) -> int:
    """How many values from the front equal the first."""
    other = (values != values[0]).nonzero()
    return int(other[0]) if len(other) else len(values)


def _read_ids(ids: Tensor) -> tuple[int, int, int] | str:
    """Rows, columns and tokens behind, of ids whose first three columns are: which picture or frame, row, column."""
    table = ids.detach().to("cpu")
    table = table[0] if table.ndim == 3 else table
    if table.ndim != 2 or table.shape[1] < 3 or len(table) == 0:
        return f"position ids must be [S, 3] or [S, 4], got {tuple(ids.shape)}"
    # Lengths of the first runs, not the largest ids: in bfloat16 ids above 256 are rounded.
    image = along(table[:, 0])
    width = along(table[:image, 1])
    height = image // width
    rows, columns = table[:image, 1], table[:image, 2]
    if height * width != image:
        return f"position ids of {image} tokens do not fill rows of {width}"
    rows, columns = rows.view(height, width), columns.view(height, width)
    if not bool((rows == rows[:, :1]).all() and (columns == columns[:1]).all()):
        return "position ids are not in raster order"
    return height, width, len(table) - image


_ids = PerTensor(_read_ids)


def ids_grid(ids: Tensor, text: int) -> TokenGeometry | str:
    """Geometry of ``text`` tokens, a picture and what stands behind it, from the position ids of all but the text."""
    found = _ids(ids)
    if isinstance(found, str):
        return found
    height, width, behind = found
    return TokenGeometry((1, height, width), prefix=text, suffix=behind)
