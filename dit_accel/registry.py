"""Adapters and installers, found through entry points so that third parties add models likewise.

``dit_accel.adapters`` holds :class:`~dit_accel.adapter.Adapter` objects. ``dit_accel.installers``
holds functions that join an adapter and a run to a transformer of one library. A source tree that
was never installed has no entry points; the packages that ship are then imported by name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Protocol

from torch import nn

from dit_accel.adapter import Adapter, AttentionRun
from dit_accel.logging import get_logger, warn_once

__all__ = ["Installation", "adapters", "find_adapter", "install"]

_logger = get_logger(__name__)
_SHIPPED = {
    "dit_accel.adapters": {
        "wan": "dit_accel_patches.wan:ADAPTER",
        "flux": "dit_accel_patches.flux:ADAPTER",
        "hunyuan_video": "dit_accel_patches.models.hunyuan_video:ADAPTER",
        "framepack": "dit_accel_patches.models.hunyuan_video:FRAMEPACK",
        "hunyuan_video15": "dit_accel_patches.models.hunyuan_video15:ADAPTER",
        "cogvideox": "dit_accel_patches.models.cogvideox:ADAPTER",
        "ltx": "dit_accel_patches.models.ltx:ADAPTER",
        "mochi": "dit_accel_patches.models.mochi:ADAPTER",
        "cosmos": "dit_accel_patches.models.visual_only:COSMOS",
        "cosmos3": "dit_accel_patches.models.cosmos3:ADAPTER",
        "allegro": "dit_accel_patches.models.visual_only:ALLEGRO",
        "latte": "dit_accel_patches.models.visual_only:LATTE",
        "easyanimate": "dit_accel_patches.models.easyanimate:ADAPTER",
        "kandinsky5": "dit_accel_patches.models.kandinsky:ADAPTER",
        "kandinsky6": "dit_accel_patches.models.kandinsky:KANDINSKY6",
        "motif": "dit_accel_patches.models.motif:ADAPTER",
        "helios": "dit_accel_patches.models.wan_like:HELIOS",
        "anyflow": "dit_accel_patches.models.wan_like:ANYFLOW",
        "minimax_h3": "dit_accel_patches.models.minimax_h3:ADAPTER",
        "flux2": "dit_accel_patches.models.flux_like:FLUX2",
        "flux3": "dit_accel_patches.models.flux_like:FLUX3",
        "chroma": "dit_accel_patches.models.flux_like:CHROMA",
        "bria": "dit_accel_patches.models.flux_like:BRIA",
        "sd3": "dit_accel_patches.models.image_latent:SD3",
        "hunyuan_image": "dit_accel_patches.models.image_latent:HUNYUAN_IMAGE",
        "cogview": "dit_accel_patches.models.image_latent:COGVIEW",
        "glm_image": "dit_accel_patches.models.image_latent:GLM",
        "pixart": "dit_accel_patches.models.image_latent:PIXART",
        "hunyuan_dit": "dit_accel_patches.models.image_latent:HUNYUAN_DIT",
        "auraflow": "dit_accel_patches.models.image_latent:AURAFLOW",
        "ernie": "dit_accel_patches.models.image_latent:ERNIE",
        "prx": "dit_accel_patches.models.image_latent:PRX",
        "qwenimage": "dit_accel_patches.models.image_other:QWENIMAGE",
        "nucleus": "dit_accel_patches.models.image_other:NUCLEUS",
        "zimage": "dit_accel_patches.models.image_other:ZIMAGE",
        "lumina2": "dit_accel_patches.models.image_other:LUMINA2",
        "hidream": "dit_accel_patches.models.image_other:HIDREAM",
        "krea2": "dit_accel_patches.models.image_other:KREA2",
        "joyimage": "dit_accel_patches.models.image_other:JOYIMAGE",
        "joyimage_plus": "dit_accel_patches.models.image_other:JOYIMAGE_PLUS",
        "generic": "dit_accel_patches.models.generic:ADAPTER",
    },
    "dit_accel.installers": {"diffusers": "dit_accel_patches.install:install"},
}


class Installation(Protocol):
    """What an installer returns. The transformer holds it, and it holds its ``owner``, the handle."""

    layers: tuple[str, ...]
    owner: object

    def undo(self) -> None:
        """Restore every original object, by identity."""


_Installer = Callable[..., Installation]


def _load(group: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    targets = dict(_SHIPPED[group])
    targets.update({point.name: point.value for point in entry_points(group=group)})
    for name, target in targets.items():
        module, _, attribute = target.partition(":")
        try:
            found[name] = getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            warn_once(_logger, (group, name), f"{group} {name!r} could not be loaded: {error}")
    return found


@cache
def adapters() -> dict[str, Adapter]:
    """Adapters by family name."""
    return _load("dit_accel.adapters")


def find_adapter(model: nn.Module) -> Adapter | None:
    """The adapter for a transformer, by the names of its class and base classes."""
    names = [cls.__name__ for cls in type(model).__mro__]
    for name in names:
        for adapter in adapters().values():
            if name in adapter.models:
                return adapter
    return None


def install(module: nn.Module, adapter: Adapter, run: AttentionRun, pipe: Any) -> Installation:
    """Join a run to a transformer.

    Raises:
        RuntimeError: if no installer could be loaded.
    """
    found: dict[str, _Installer] = _load("dit_accel.installers")
    if "diffusers" not in found:
        raise RuntimeError("no integration could be loaded; install dit-accel[diffusers] (see the warning above)")
    return found["diffusers"](module, adapter, run, pipe=pipe)
