"""HunyuanVideo-1.5: video tokens, then picture, glyph and text tokens, the valid ones first.

diffusers' processor builds three boolean masks ``[B, 1, S, S]`` in every layer, 12 GB each at 720p. All that they say is
which keys are valid, so the call below hands on ``[B, 1, 1, S]``. Queries at padded places then see the valid keys
instead of nothing; no one reads what comes out there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.geometry import TokenGeometry
from dit_accel_patches.family import Family, Size
from dit_accel_patches.processor import CALLS
from dit_accel_patches.readers import Call, latent_grid, token_count

__all__ = ["ADAPTER"]


def _geometry(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TokenGeometry | str:
    call = Call(module, args, kwargs)
    config = call.config
    grid = latent_grid(call.tensor("hidden_states"), config.patch_size_t, config.patch_size, config.patch_size)
    names = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    return TokenGeometry(grid, suffix=token_count(*(call.get(name) for name in names)))


def _stream(attn: Any, hidden: Tensor, added: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised q, k and v ``[B, S, H, D]`` of the video, or of the stream beside it."""
    if added:
        projections, norms = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k)
    else:
        projections, norms = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k)
    q, k, v = (project(hidden).unflatten(2, (attn.heads, -1)) for project in projections)
    q, k = (x if norm is None else norm(x) for x, norm in zip((q, k), norms, strict=True))
    return q, k, v


def _attend(
    self: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """Joint attention of one block with a mask of valid keys."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn
    from diffusers.models.embeddings import apply_rotary_emb

    q, k, v = _stream(attn, hidden_states, added=False)
    if image_rotary_emb is not None:
        q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
    video = q.shape[1]
    if encoder_hidden_states is not None:
        beside = _stream(attn, encoder_hidden_states, added=True)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip((q, k, v), beside, strict=True))
    mask = None
    if attention_mask is not None:
        mask = torch.nn.functional.pad(attention_mask, (q.shape[1] - attention_mask.shape[1], 0), value=True)
        mask = mask.bool()[:, None, None, :]
    out = dispatch_attention_fn(
        q, k, v, attn_mask=mask, backend=self._attention_backend, parallel_config=self._parallel_config
    )
    out = out.flatten(2, 3).to(q.dtype)
    if encoder_hidden_states is None:
        return out, None
    visual, text = out[:, :video], out[:, video:]
    for layer in attn.to_out:
        visual = layer(visual)
    return visual, attn.to_add_out(text)


CALLS["HunyuanVideo15AttnProcessor2_0"] = _attend

ADAPTER = Family(
    name="hunyuan_video15",
    models=("HunyuanVideo15Transformer3DModel",),
    blocks=("transformer_blocks",),
    attention=("attn",),
    geometry=_geometry,
    note="HunyuanVideo-1.5 text and image to video; masks of S² booleans are not built",
    layout="video | picture, glyphs and text",
    dense="the token refiner of the text",
    sizes=(
        Size("720p, 121 frames", (31, 45, 80), 1985),
        Size("480p, 121 frames", (31, 30, 53), 1985),
    ),
    outer_mask=True,
)
