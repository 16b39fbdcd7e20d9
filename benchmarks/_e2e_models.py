"""Transformers of full size with random weights, and what one forward call of each takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CASES", "TOY", "Case", "build", "inputs"]

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One model at one size.

    Attributes:
        name: as printed.
        family: which class and which arguments.
        heads: attention heads.
        dim: columns of a head.
        grid: latent frames, rows and columns in tokens.
        text: text tokens, in the same sequence or in cross-attention.
        layers: blocks of each list, as the checkpoint has them.
        some: blocks that are built by default.
        more: further arguments of the transformer.
        batch: samples of a call; CogVideoX has both branches of guidance in one.
    """

    name: str
    family: str
    heads: int
    dim: int
    grid: tuple[int, int, int]
    text: int
    layers: tuple[int, ...]
    some: tuple[int, ...]
    more: tuple[tuple[str, Any], ...] = ()
    batch: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of the self-attention."""
        frames, height, width = self.grid
        return frames * height * width + (0 if self.family == "wan" else self.text)


_WAN = (("text_dim", 4096), ("freq_dim", 256), ("in_channels", 16), ("out_channels", 16))
_WAN_14B, _WAN_1B = (*_WAN, ("ffn_dim", 13824)), (*_WAN, ("ffn_dim", 8960))
_HUNYUAN = (("in_channels", 16), ("text_embed_dim", 4096), ("pooled_projection_dim", 768), ("num_refiner_layers", 2))
_COG = (("in_channels", 16), ("text_embed_dim", 4096), ("time_embed_dim", 512))
_FLUX = (("in_channels", 64), ("joint_attention_dim", 4096), ("pooled_projection_dim", 768))

#: In the order in which they are measured.
CASES = {
    "wan-14b-720p": Case("Wan 14B 720p 81f", "wan", 40, 128, (21, 45, 80), 512, (40,), (3,), _WAN_14B),
    "hunyuan-720p": Case("HunyuanVideo 720p 129f", "hunyuan", 24, 128, (33, 45, 80), 256, (20, 40), (1, 2), _HUNYUAN),
    "wan-1.3b-480p": Case("Wan 1.3B 480p 81f", "wan", 12, 128, (21, 30, 52), 512, (30,), (8,), _WAN_1B),
    "wan-14b-480p": Case("Wan 14B 480p 81f", "wan", 40, 128, (21, 30, 52), 512, (40,), (4,), _WAN_14B),
    "cogvideox-5b": Case("CogVideoX-5B 480x720 49f", "cog", 48, 64, (13, 30, 45), 226, (42,), (8,), _COG, 2),
    "flux-2048": Case("FLUX 2048x2048", "flux", 24, 128, (1, 128, 128), 512, (19, 38), (2, 4), _FLUX),
    "flux-4096": Case("FLUX 4096x4096", "flux", 24, 128, (1, 256, 256), 512, (19, 38), (1, 2), _FLUX),
    "flux-1024": Case("FLUX 1024x1024", "flux", 24, 128, (1, 64, 64), 512, (19, 38), (4, 8), _FLUX),
}

_TINY_WAN = (("text_dim", 16), ("freq_dim", 32), ("in_channels", 4), ("out_channels", 4), ("ffn_dim", 64))
_TINY_HUNYUAN = (("in_channels", 4), ("text_embed_dim", 16), ("pooled_projection_dim", 8), ("num_refiner_layers", 1))
_TINY_COG = (("in_channels", 4), ("text_embed_dim", 16), ("time_embed_dim", 16))
_TINY_FLUX = (("in_channels", 4), ("joint_attention_dim", 16), ("pooled_projection_dim", 8))

TOY = {
    "toy-wan": Case("toy Wan", "wan", 2, 64, (3, 16, 16), 8, (2,), (2,), _TINY_WAN),
    "toy-hunyuan": Case("toy HunyuanVideo", "hunyuan", 2, 64, (2, 16, 16), 16, (1, 1), (1, 1), _TINY_HUNYUAN),
    "toy-cog": Case("toy CogVideoX", "cog", 2, 64, (2, 16, 16), 16, (2,), (2,), _TINY_COG, 2),
    "toy-flux": Case("toy FLUX", "flux", 2, 64, (1, 24, 24), 16, (1, 1), (1, 1), _TINY_FLUX),
}


def build(case: Case, layers: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The transformer with so many blocks and random weights, made on the device."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: nn.Module = _BUILD[case.family](case, layers)
    finally:
        torch.set_default_dtype(before)
    for part in getattr(model, "_keep_in_fp32_modules", None) or ():
        for name, parameter in model.named_parameters():
            if part in name.split("."):
                parameter.data = parameter.data.float()  # as from_pretrained leaves them
    return model.eval().requires_grad_(False)


def inputs(case: Case, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Arguments of a forward call, but for the timestep."""
    made = torch.Generator(device).manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made, device=device, dtype=dtype)

    return _INPUTS[case.family](case, noise, device)


def _wan(case: Case, layers: tuple[int, ...]) -> nn.Module:
    from diffusers import WanTransformer3DModel

    options: Inputs = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "patch_size": (1, 2, 2)}
    sizes: Inputs = {"num_attention_heads": case.heads, "attention_head_dim": case.dim, "num_layers": layers[0]}
    return WanTransformer3DModel(**sizes, **options, **dict(case.more))


def _wan_inputs(case: Case, noise: Callable[..., Tensor], device: torch.device) -> Inputs:
    more, (frames, height, width) = dict(case.more), case.grid
    return {
        "hidden_states": noise(case.batch, more["in_channels"], frames, 2 * height, 2 * width),
        "encoder_hidden_states": noise(case.batch, case.text, more["text_dim"]),
    }


def _without_mask(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return *args[:3], None, *args[4:]


def _hunyuan(case: Case, layers: tuple[int, ...]) -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    sizes: Inputs = {"num_attention_heads": case.heads, "attention_head_dim": case.dim}
    counts: Inputs = {"num_layers": layers[0], "num_single_layers": layers[1], "guidance_embeds": True}
    axes = (case.dim // 8, case.dim * 7 // 16, case.dim * 7 // 16)
    options: Inputs = {"rope_axes_dim": axes, "out_channels": dict(case.more)["in_channels"]}
    model = HunyuanVideoTransformer3DModel(**sizes, **counts, **options, **dict(case.more))
    # All text tokens are valid. The mask that says so makes dense attention slower, which would flatter us.
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.register_forward_pre_hook(_without_mask)
    return model


def _hunyuan_inputs(case: Case, noise: Callable[..., Tensor], device: torch.device) -> Inputs:
    more, (frames, height, width) = dict(case.more), case.grid
    return {
        "hidden_states": noise(case.batch, more["in_channels"], frames, 2 * height, 2 * width),
        "encoder_hidden_states": noise(case.batch, case.text, more["text_embed_dim"]),
        "encoder_attention_mask": torch.ones(case.batch, case.text, dtype=torch.bool, device=device),
        "pooled_projections": noise(case.batch, more["pooled_projection_dim"]),
        "guidance": torch.full((case.batch,), 6000.0, device=device),
    }


def _cog(case: Case, layers: tuple[int, ...]) -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    frames, height, width = case.grid
    sizes: Inputs = {"num_attention_heads": case.heads, "attention_head_dim": case.dim, "num_layers": layers[0]}
    options: Inputs = {"use_rotary_positional_embeddings": True, "max_text_seq_length": case.text}
    options |= {"sample_height": 2 * height, "sample_width": 2 * width, "sample_frames": 4 * frames - 3}
    return CogVideoXTransformer3DModel(
        **sizes, **options, out_channels=dict(case.more)["in_channels"], **dict(case.more)
    )


def _cog_inputs(case: Case, noise: Callable[..., Tensor], device: torch.device) -> Inputs:
    more, (frames, height, width) = dict(case.more), case.grid
    angles = torch.rand(frames * height * width, case.dim // 2, device=device).repeat_interleave(2, 1)
    return {
        "hidden_states": noise(case.batch, frames, more["in_channels"], 2 * height, 2 * width),
        "encoder_hidden_states": noise(case.batch, case.text, more["text_embed_dim"]),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _flux(case: Case, layers: tuple[int, ...]) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    sizes: Inputs = {"num_attention_heads": case.heads, "attention_head_dim": case.dim, "guidance_embeds": True}
    axes = (case.dim // 8, case.dim * 7 // 16, case.dim * 7 // 16)
    counts: Inputs = {"num_layers": layers[0], "num_single_layers": layers[1], "axes_dims_rope": axes}
    return FluxTransformer2DModel(patch_size=1, **sizes, **counts, **dict(case.more))


def _flux_inputs(case: Case, noise: Callable[..., Tensor], device: torch.device) -> Inputs:
    more, (_, height, width) = dict(case.more), case.grid
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.stack((torch.zeros_like(rows), rows, columns), -1).flatten(0, 1).float().to(device)
    return {
        "hidden_states": noise(case.batch, height * width, more["in_channels"]),
        "encoder_hidden_states": noise(case.batch, case.text, more["joint_attention_dim"]),
        "pooled_projections": noise(case.batch, more["pooled_projection_dim"]),
        "guidance": torch.full((case.batch,), 3.5, device=device),
        "img_ids": ids,
        "txt_ids": torch.zeros(case.text, 3, device=device),
    }


_BUILD: dict[str, Callable[[Case, tuple[int, ...]], nn.Module]] = {
    "wan": _wan,
    "hunyuan": _hunyuan,
    "cog": _cog,
    "flux": _flux,
}
_INPUTS: dict[str, Callable[[Case, Callable[..., Tensor], torch.device], Inputs]] = {
    "wan": _wan_inputs,
    "hunyuan": _hunyuan_inputs,
    "cog": _cog_inputs,
    "flux": _flux_inputs,
}
