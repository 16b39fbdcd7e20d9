"""Picture models that tell their grid in ways of their own: Qwen-Image, Z-Image, Lumina 2, HiDream and others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dit_accel.geometry import TokenGeometry
from dit_accel_patches.family import Family, Size
from dit_accel_patches.readers import Call, PerTensor, ids_grid, latent_grid, token_count

__all__ = ["HIDREAM", "JOYIMAGE", "JOYIMAGE_PLUS", "KREA2", "LUMINA2", "NUCLEUS", "QWENIMAGE", "ZIMAGE"]

_1K = (Size("1024×1024", (1, 64, 64)),)
# Z-Image fills pictures and captions up to whole multiples of this.
_MULTIPLE = 32


def _shapes(shapes: Any) -> list[tuple[int, int, int]] | str:
    """Frames, rows and columns of the pictures of a sample, the same in all samples."""
    if isinstance(shapes, tuple) and len(shapes) == 3 and all(isinstance(n, int) for n in shapes):
        return [shapes]
    samples = [[sample] if isinstance(sample[0], int) else list(sample) for sample in shapes]
    if any(sample != samples[0] for sample in samples):
        return f"pictures of one batch have different sizes: {shapes}"
    return [(int(f), int(h), int(w)) for f, h, w in samples[0]]


def _qwen(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    found = _shapes(call.get("img_shapes"))
    if isinstance(found, str):
        return found
    behind = call.tensor("hidden_states").shape[1] - found[0][0] * found[0][1] * found[0][2]
    return TokenGeometry(found[0], prefix=call.tensor("encoder_hidden_states").shape[1], suffix=behind)


def _nucleus(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    found = _shapes(Call(module, args, kwargs).get("img_shapes"))
    # Text is among the keys alone.
    return found if isinstance(found, str) else TokenGeometry(found[0])


def _zimage(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    pictures, captions = call.get("x"), call.get("cap_feats")
    if not isinstance(pictures[0], Tensor) or not isinstance(captions[0], Tensor):
        return "several pictures a sample (omni) stand in the sequence"
    shapes = {tuple(picture.shape) for picture in pictures}
    if len(shapes) > 1:
        return f"pictures of one batch have different sizes: {sorted(shapes)}"
    patch, frames = call.get("patch_size") or 2, call.get("f_patch_size") or 1
    grid = latent_grid(pictures[0][None], frames, patch, patch)
    filling = -grid[0] * grid[1] * grid[2] % _MULTIPLE
    text = max(-(-len(caption) // _MULTIPLE) * _MULTIPLE for caption in captions)
    return TokenGeometry(grid, suffix=filling + text)


def _text_lengths(mask: Tensor) -> list[int]:
    # The model itself waits for the device to learn them.
    return [int(n) for n in mask.sum(1).tolist()]


_lengths = PerTensor(_text_lengths)


def _lumina2(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    lengths = _lengths(call.tensor("encoder_attention_mask"))
    if len(set(lengths)) > 1:
        return f"prompts of {lengths} tokens in one batch put the picture at different places"
    patch = call.config.patch_size
    return TokenGeometry(latent_grid(call.tensor("hidden_states"), patch, patch), prefix=lengths[0])


def _hidream(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    hidden, model = call.tensor("hidden_states"), module
    if hidden.ndim != 4:
        return "the picture was cut into patches by the caller"
    patch = call.config.patch_size
    grid = latent_grid(hidden, patch, patch)
    places = grid[1] * grid[2] if hidden.shape[2] == hidden.shape[3] else int(getattr(model, "max_seq", 0))
    llama = call.tensor("encoder_hidden_states_llama3")
    text = call.tensor("encoder_hidden_states_t5").shape[1] + 2 * llama.shape[-2]
    return TokenGeometry(grid, suffix=places - grid[1] * grid[2] + text)


def _krea2(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    text = call.tensor("encoder_hidden_states").shape[1]
    return _picture_ids(call.tensor("position_ids"), text)


def _picture_ids(ids: Tensor, text: int) -> TokenGeometry | str:
    """The ids of text and picture in one table; that of the text is known by its length."""
    cut = _cut.setdefault(text, PerTensor(lambda table: table[text:]))
    return ids_grid(cut(ids), text)


_cut: dict[int, PerTensor] = {}


def _joyimage(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    hidden: Tensor = call.tensor("hidden_states")
    text = call.tensor("encoder_hidden_states").shape[1]
    frames, patch_height, patch_width = call.config.patch_size
    if hidden.ndim == 6:  # pictures of one size, side by side: [B, N, C, F, H, W]
        pictures, (depth, height, width) = hidden.shape[1], hidden.shape[3:]
        return TokenGeometry((pictures * depth // frames, height // patch_height, width // patch_width), suffix=text)
    return TokenGeometry(latent_grid(hidden, frames, patch_height, patch_width), suffix=text)


def _joyimage_plus(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    found = _shapes(call.get("shape_list"))
    if isinstance(found, str):
        return found
    places = call.tensor("hidden_states").shape[1]
    first = found[0][0] * found[0][1] * found[0][2]
    return TokenGeometry(found[0], suffix=places - first + token_count(call.get("encoder_hidden_states")))


QWENIMAGE = Family(
    name="qwenimage",
    models=("QwenImageTransformer2DModel",),
    blocks=("transformer_blocks",),
    attention=("attn",),
    geometry=_qwen,
    task="image",
    note="Qwen-Image, Edit, Edit Plus, Layered, ControlNet",
    layout="text | picture (references behind)",
    sizes=(Size("1328×1328", (1, 83, 83), 1024),),
)

NUCLEUS = Family(
    name="nucleus",
    models=("NucleusMoEImageTransformer2DModel",),
    blocks=("transformer_blocks",),
    attention=("attn",),
    geometry=_nucleus,
    task="image",
    note="Nucleus-Image; text is among the keys alone and is exact",
    layout="picture; keys picture | text",
    sizes=_1K,
)

ZIMAGE = Family(
    name="zimage",
    models=("ZImageTransformer2DModel",),
    blocks=("layers",),
    attention=("attention",),
    geometry=_zimage,
    task="image",
    note="Z-Image and Turbo; the omni form, with several pictures, is dense",
    layout="picture | caption",
    dense="the refiners",
    sizes=(Size("1024×1024", (1, 64, 64), 512),),
)

LUMINA2 = Family(
    name="lumina2",
    models=("Lumina2Transformer2DModel",),
    blocks=("layers",),
    attention=("attn",),
    geometry=_lumina2,
    task="image",
    note="Lumina-Image 2.0; prompts of different lengths in one batch are dense",
    layout="caption | picture",
    dense="the refiners",
    head_dim=(96,),
    sizes=(Size("1024×1024", (1, 64, 64), 256),),
)

HIDREAM = Family(
    name="hidream",
    models=("HiDreamImageTransformer2DModel",),
    blocks=("double_stream_blocks", "single_stream_blocks"),
    attention=("block.attn1",),
    geometry=_hidream,
    task="image",
    note="HiDream-I1 and E1",
    layout="picture | text of three encoders",
    sizes=(Size("1024×1024", (1, 64, 64), 384),),
)

KREA2 = Family(
    name="krea2",
    models=("Krea2Transformer2DModel",),
    blocks=("transformer_blocks",),
    attention=("attn",),
    geometry=_krea2,
    task="image",
    note="Krea 2",
    layout="text | picture",
    dense="the blocks that fuse the layers of the text encoder",
    sizes=_1K,
)

JOYIMAGE = Family(
    name="joyimage",
    models=("JoyImageEditTransformer3DModel",),
    blocks=("double_blocks",),
    attention=("attn",),
    geometry=_joyimage,
    task="image",
    note="JoyImage-Edit",
    layout="pictures | text",
    sizes=_1K,
)

JOYIMAGE_PLUS = Family(
    name="joyimage_plus",
    models=("JoyImageEditPlusTransformer3DModel",),
    blocks=("double_blocks",),
    attention=("attn",),
    geometry=_joyimage_plus,
    task="image",
    note="JoyImage-Edit Plus",
    layout="picture (references behind) | text",
    sizes=_1K,
)
