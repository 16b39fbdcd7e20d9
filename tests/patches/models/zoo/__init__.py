"""Tiny transformers of every supported class, with random weights, built offline: each maker returns model and arguments.

The values follow the argument lists of the classes; sizes are chosen so that a head has the columns of the published
checkpoints, and the visual tokens fill about sixteen blocks of sixteen.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from . import image, image_more, packed, ragged, video, video_more

__all__ = ["MAKERS"]

_HELPERS = ("noise", "lengths", "ids", "picture", "chroma")


def _makers(module: ModuleType) -> dict[str, Callable[[], Any]]:
    found = {name: value for name, value in vars(module).items() if callable(value) and not name.startswith("_")}
    return {
        name: maker
        for name, maker in found.items()
        if getattr(maker, "__module__", "") == module.__name__ and name not in _HELPERS
    }


#: Maker of each case by name.
MAKERS: dict[str, Callable[[], Any]] = {
    name: maker
    for module in (video, video_more, packed, image, image_more, ragged)
    for name, maker in _makers(module).items()
}
MAKERS["chroma"] = image.chroma
