"""Which of ComfyUI's models are accelerated, and how each lays out its tokens."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from torch import Tensor

from dit_accel_patches.comfyui.layouts import (
    Layout,
    LayoutFn,
    image_last,
    text_first,
    text_last,
    visual_only,
    with_refiners,
)

__all__ = ["FAMILIES", "Family", "find_family"]


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        name: as people know it.
        models: class names in ``comfy.ldm``.
        blocks: attributes that hold the blocks, in the order in which they run.
        layout: reads the token layout of a forward call.
        twins: classes of diffusers with the same layers and token order, whose static plans fit.
    """

    name: str
    models: tuple[str, ...]
    blocks: tuple[str, ...]
    layout: LayoutFn
    twins: tuple[str, ...] = ()

    def read(self, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Layout | str:
        """Token layout of a forward call of ``model``, or the reason why it is not known."""
        names = _parameters(cast(Hashable, type(model)))
        given = {**dict(zip(names, args)), **kwargs}
        latent = args[0] if args else given.get("x")
        if isinstance(latent, list | tuple) and latent:
            latent = latent[0]  # video and sound
        if not isinstance(latent, Tensor):
            return f"the latent of {type(model).__name__} is {type(latent).__name__}, not a tensor"
        try:
            return self.layout(model, latent, given.get)
        except (AttributeError, TypeError, ValueError) as error:
            return f"the token layout of {type(model).__name__} could not be read: {error}"

    def counts(self, model: Any) -> list[int]:
        """Number of blocks in each list of :attr:`blocks`."""
        return [len(getattr(model, name, ())) for name in self.blocks]


@cache
def _parameters(cls: Any) -> tuple[str, ...]:
    """Names of the positional parameters of ``forward`` without ``self``."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind in kinds)


FAMILIES = (
    Family("Wan 2.1 / 2.2", ("WanModel",), ("blocks",), visual_only, ("WanTransformer3DModel",)),
    Family("HunyuanVideo / HunyuanImage", ("HunyuanVideo",), ("double_blocks", "single_blocks"), text_last),
    Family("LTX", ("LTXVModel", "LTXBaseModel", "LTXAVModel"), ("transformer_blocks",), visual_only),
    Family("Cosmos 1 / 2", ("GeneralDIT", "MiniTrainDIT"), ("blocks",), visual_only),
    Family(
        "FLUX / Chroma / FLUX.2",
        ("Flux", "Chroma"),
        ("double_blocks", "single_blocks"),
        text_first,
        ("FluxTransformer2DModel",),
    ),
    Family("Qwen-Image", ("QwenImageTransformer2DModel",), ("transformer_blocks",), text_first),
    Family("Lumina 2 / Z-Image", ("NextDiT",), ("layers",), with_refiners),
    Family(
        "HiDream",
        ("HiDreamImageTransformer2DModel",),
        ("double_stream_blocks", "single_stream_blocks"),
        image_last,
    ),
    Family("AuraFlow", ("MMDiT",), ("double_layers", "single_layers"), text_first),
)

_NO_OVERRIDE = "ComfyUI gives its attention no hook"
_DENSE = {
    "OpenAISignatureMMDITWrapper": _NO_OVERRIDE,  # Stable Diffusion 3, a base class of which is also named MMDiT
    "AsymmDiTJoint": _NO_OVERRIDE,
    "PixArtMS": _NO_OVERRIDE,
    "HunYuanDiT": _NO_OVERRIDE,
    "HunYuanDiTPlain": _NO_OVERRIDE,
    "ACEStepTransformer2DModel": _NO_OVERRIDE,
    "OmniGen2Transformer2DModel": "its forward call cannot be wrapped, so that its grid is not known",
    "UNetModel": "it is a U-Net, whose sequences are short",
    "AudioDiffusionTransformer": "its sequences are sound, not pictures",
    "Hunyuan3Dv2": "its tokens lie on no grid",
}


def find_family(model: Any) -> Family | str:
    """The family of a diffusion model by the names of its class and base classes, or why it stays dense."""
    name = type(model).__name__
    for cls in type(model).__mro__:
        if cls.__name__ in _DENSE:
            return f"{name} cannot be accelerated: {_DENSE[cls.__name__]}"
        for family in FAMILIES:
            if cls.__name__ in family.models:
                return family
    return f"{name} is not known; known are " + ", ".join(family.name for family in FAMILIES)
