"""Each adapter is right about where the visual tokens stand: one pixel changes the query that it should change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_zoo import MAKERS
from torch import Tensor, nn

from dit_accel.geometry import TokenGeometry
from dit_accel.registry import find_adapter
from dit_accel_patches.install import install

#: Models whose picture tokens see each other before the first accelerated block: all of them change, and no others.
MIXED = ("zimage", "zimage_ragged", "lumina2", "flux3")
#: Axes of frames, rows and columns, where they are not the last three of five or the last two of four.
AXES = {
    "cogvideox": (1, 3, 4),
    "cogvideox_i2v": (1, 3, 4),
    "cogvideox15": (1, 3, 4),
    "consisid": (1, 3, 4),
    "anyflow": (1, 3, 4),
    "kandinsky5": (1, 2, 3),
    "kandinsky6": (1, 2, 3),
}
#: Tokens of a packed input in front of those of the grid.
IN_FRONT = {"minimax_h3": 20}


class FirstQuery:
    """An attention run that keeps queries and keys of layer 0, and computes dense."""

    wants_cross = False

    def __init__(self) -> None:
        self.query: Tensor | None = None
        self.key: Tensor | None = None
        self.geometry: Any = None

    def begin_forward(self, geometry: Any, step: Any) -> None:
        self.geometry = geometry

    def attend(self, query, key, value, *, layer, scale, key_valid, dense):  # type: ignore[no-untyped-def]
        if layer == 0 and self.query is None:
            self.query, self.key = query.clone(), key.clone()
        return dense(query, key, value)

    def decline(self, layer: int, reason: str) -> None: ...

    def reset(self) -> None: ...


def first_call(model: nn.Module, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, TokenGeometry]:
    adapter, run = find_adapter(model), FirstQuery()
    assert adapter is not None
    installed = install(model, adapter, run)
    with torch.no_grad():
        model(**arguments, return_dict=False)
    installed.undo()
    assert run.query is not None
    assert run.key is not None
    return run.query, run.key, run.geometry


def differing(before: Tensor, after: Tensor) -> list[int]:
    """Tokens of ``[B, S, H, D]`` that are not the same."""
    return (before != after).flatten(2).any(2).any(0).nonzero().flatten().tolist()


def touched(name: str, arguments: dict[str, Any], grid: tuple[int, int, int], place: tuple[int, int, int]) -> dict:
    """The arguments with one place of the visual input changed."""
    key = next(key for key in ("hidden_states", "x", "vision_tokens") if key in arguments)
    given = arguments[key]
    changed = (given[0] if isinstance(given, list) else given).clone()
    raster = (place[0] * grid[1] + place[1]) * grid[2] + place[2]
    if changed.ndim == 3 or name == "joyimage_plus":
        changed[:, IN_FRONT.get(name, 0) + raster] += 5.0
    else:
        by_ndim = {4: (2, 3), 5: (2, 3, 4), 6: (1, 4, 5)}
        axes = (1, 2, 3) if name.startswith("zimage") else AXES.get(name, by_ndim[changed.ndim])
        index: list[Any] = [slice(None)] * changed.ndim
        for axis, tokens, at in zip(axes, grid[-len(axes) :], place[-len(axes) :], strict=True):
            index[axis] = at * (changed.shape[axis] // tokens)
        if name == "joyimage":  # the last picture is the first of the sequence
            index[1] = (place[0] - 1) % 2
        if name.startswith("latte"):
            index[2] = 1
        changed[tuple(index)] += 5.0
    others = given[1:] if isinstance(given, list) else None
    return {**arguments, key: changed if others is None else [changed, *others]}


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "bria_fibo2"])
def test_one_place_of_the_picture_is_one_query(name: str, make: Any) -> None:
    model, arguments = make(name)
    query, key, geometry = first_call(model, arguments)
    assert geometry.grid is not None
    frames, height, width = geometry.grid
    place = (min(1, frames - 1), height // 2, width - 3)
    other_query, other_key, _ = first_call(model, touched(name, arguments, geometry.grid, place))
    changed = differing(query, other_query)
    assert differing(key, other_key) == changed
    if name in MIXED:
        # Z-Image fills up to a multiple of 32; before diffusers 0.37 the filling did not see the picture.
        filling = (0, -geometry.visual % 32) if name.startswith("zimage") else (0,)
        ends = [geometry.prefix + geometry.visual + more for more in filling]
        assert changed in [list(range(geometry.prefix, end)) for end in ends]
    else:
        assert changed == [geometry.prefix + (place[0] * height + place[1]) * width + place[2]]
