"""Where the tokens of a ComfyUI model sit, read from the arguments of its forward call.

The models and their orders of text and image were read in ComfyUI 0.3.75 and 0.35 to 0.38 (``comfy/ldm``). ComfyUI pads a
latent up to whole patches, so sizes are divided upwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dit_accel.geometry import Grid, TokenGeometry

__all__ = ["Arguments", "Layout", "LayoutFn", "image_last", "text_first", "text_last", "visual_only", "with_refiners"]

#: ``name -> value`` of the arguments of a forward call; ``None`` for those that were not given.
Arguments = Callable[[str], Any]
#: Reads the layout from ``(model, latent [B, C, (F,) H, W], arguments)``; a string is the reason to stay dense.
LayoutFn = Callable[[Any, Tensor, Arguments], "Layout | str"]


@dataclass(frozen=True)
class Layout:
    """The sequences that one forward call may contain.

    Attributes:
        grid: latent frames, rows and columns, counted in tokens.
        front: tokens in front of the visual ones.
        behind: tokens behind them; ``None`` stands for any number.
        lone: tokens behind the visual ones in sequences without text (refiner blocks); ``None`` if there are none.
    """

    grid: Grid
    front: int = 0
    behind: int | None = 0
    lone: int | None = None

    @property
    def visual(self) -> int:
        """Number of visual tokens."""
        return math.prod(self.grid)

    def geometry(self, tokens: int) -> TokenGeometry | str | None:
        """Geometry of a sequence of ``tokens``, a reason why it is unknown, or ``None`` for text or sound alone."""
        rest = tokens - self.visual
        if rest < 0:
            return None
        if rest >= self.front and self.behind in (None, rest - self.front):
            return TokenGeometry(self.grid, self.front, rest - self.front)
        if self.lone == rest:
            return TokenGeometry(self.grid, 0, rest)
        expected = f"{self.front} + {self.visual}" + ("" if not self.behind else f" + {self.behind}")
        return f"the sequence has {tokens} tokens, expected {expected} (another node or an unknown reference adds some)"


def grid_of(model: Any, latent: Tensor) -> Grid:
    """Tokens per axis of a latent ``[B, C, H, W]`` or ``[B, C, F, H, W]``.

    Raises:
        ValueError: if the latent has another rank.
    """
    if latent.ndim not in (4, 5):
        raise ValueError(f"the latent must be [B, C, H, W] or [B, C, F, H, W], got {tuple(latent.shape)}")
    sizes = tuple(latent.shape[2:]) if latent.ndim == 5 else (1, *latent.shape[2:])
    frames, height, width = (-(-size // patch) for size, patch in zip(sizes, _patch(model), strict=True))
    return frames, height, width


def _patch(model: Any) -> tuple[int, int, int]:
    """Patch size (frames, rows, columns)."""
    if hasattr(model, "patch_spatial"):
        return int(getattr(model, "patch_temporal", 1)), int(model.patch_spatial), int(model.patch_spatial)
    size = getattr(model, "patch_size", None)
    if size is None:
        size = getattr(getattr(model, "patchifier", None), "patch_size", None)
    if isinstance(size, int):
        return 1, size, size
    if isinstance(size, Sequence) and len(size) in (2, 3):
        whole = (1, *size) if len(size) == 2 else tuple(size)
        return int(whole[0]), int(whole[1]), int(whole[2])
    raise ValueError(f"the patch size of {type(model).__name__} is not known, got {size!r}")


def _tokens(model: Any, latents: Any) -> int:
    """Tokens of reference latents: one tensor, several, or ``None``."""
    if latents is None:
        return 0
    given = [latents] if isinstance(latents, Tensor) else list(latents)
    return sum(math.prod(grid_of(model, latent)) for latent in given)


def _length(text: Any) -> int:
    return int(text.shape[1]) if isinstance(text, Tensor) else 0


def visual_only(model: Any, latent: Tensor, arg: Arguments) -> Layout | str:
    """Wan, LTX, Cosmos: text comes in by cross-attention.

    Wan's full reference stands in front, its context and sound references behind; LTX filters guide frames at the end.
    """
    frames, height, width = grid_of(model, latent)
    more = arg("time_dim_concat")
    if isinstance(more, Tensor):
        frames += grid_of(model, more)[0]
    guides = arg("keyframe_idxs")
    if isinstance(guides, Tensor) and guides.shape[2] > 0:
        frames -= -(-int(guides.shape[2]) // (height * width))
        if frames < 1:
            return f"{guides.shape[2]} guide tokens leave no frame of a {height}x{width} grid"
        return Layout((frames, height, width), 0, None)
    reference = arg("reference_latent")
    if isinstance(reference, Tensor) and getattr(model, "ref_conv", None) is not None:
        return Layout((frames, height, width), _tokens(model, reference), None)
    return Layout((frames, height, width), 0, None)


def text_first(model: Any, latent: Tensor, arg: Arguments) -> Layout | str:
    """FLUX, Chroma, Qwen-Image, AuraFlow: text, image, tokens of reference images."""
    options = arg("transformer_options") or {}
    if options.get("patches", {}).get("post_input"):
        return "another node changes the tokens (a post_input patch)"
    registers = getattr(model, "register_tokens", None)
    front = _length(arg("context")) + _length(registers)
    return Layout(grid_of(model, latent), front, _tokens(model, arg("ref_latents")))


def text_last(model: Any, latent: Tensor, arg: Arguments) -> Layout | str:
    """HunyuanVideo and HunyuanImage: a reference image, the video, every kind of text."""
    return Layout(grid_of(model, latent), _tokens(model, arg("ref_latent")), None)


def image_last(model: Any, latent: Tensor, arg: Arguments) -> Layout | str:
    """HiDream: image (an edited image beside it), then text whose length changes from block to block."""
    frames, height, width = grid_of(model, latent)
    edited = arg("image_cond")
    if isinstance(edited, Tensor):
        width = -(-(int(latent.shape[-1]) + int(edited.shape[-1])) // _patch(model)[2])
    return Layout((frames, height, width), 0, None)


def with_refiners(model: Any, latent: Tensor, arg: Arguments) -> Layout | str:
    """Lumina 2 and Z-Image: caption, image; both padded in Z-Image; refiner blocks see the image alone."""
    if arg("ref_latents"):
        return "reference images change the order of the tokens (Z-Image omni)"
    multiple = getattr(model, "pad_tokens_multiple", None) or 1
    grid = grid_of(model, latent)
    caption = _length(arg("context")) + _length(arg("direct_context"))
    references = _tokens(model, arg("ref_frames"))
    padding = -(math.prod(grid) + references) % multiple
    return Layout(grid, -(-caption // multiple) * multiple, references + padding, references + padding)
