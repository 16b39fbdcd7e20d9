"""The parts of the tiny FLUX pipeline, untrained.

Pictures of 256 x 256, halved by the VAE and packed in twos as `FluxPipeline` does: 64 x 64 = 4,096 picture tokens, behind
512 text tokens, the lengths of FLUX.1 at 1024 x 1024. The pipeline hands every padding position to the transformer; so
does the training, mostly with 128 of them.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tiny_wan_training"))

from models import make_tokenizer

CHANNELS = 4
TEXT_DIM, POOLED_DIM = 128, 64
TEXT_LENGTH, POOLED_LENGTH = 512, 77
#: Positions that any sentence of the grammar fits into. With the picture's tokens they are a multiple of 128: cuDNN's
#: attention makes NaN of gradients at some other lengths (pytorch issue 196678).
SHORT_LENGTH = 128
SHIFT = 3.0


def make_vae() -> AutoencoderKL:
    """Build the VAE: half of the height and width, four channels."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=256,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        vae.encoder.conv_out.bias[CHANNELS:] = -4.0  # begin with little noise, so that there is a signal to learn from
    return vae


def make_transformer(heads: int = 3, layers: int = 2, single_layers: int = 7) -> FluxTransformer2DModel:
    """Build the transformer; modulation starts at zero with small open gates, the output at zero."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * CHANNELS,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    )
    dim = 64 * heads
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in model.transformer_blocks:
            for norm in (block.norm1, block.norm1_context):
                nn.init.zeros_(norm.linear.weight)
                norm.linear.bias[2 * dim : 3 * dim] = 0.3
                norm.linear.bias[5 * dim :] = 0.3
        for block in model.single_transformer_blocks:
            nn.init.zeros_(block.norm.linear.weight)
            block.norm.linear.bias[2 * dim :] = 0.3
        nn.init.zeros_(model.norm_out.linear.weight)
        nn.init.zeros_(model.proj_out.weight)
    return model


def make_text_encoder(vocabulary: int) -> T5EncoderModel:
    """Build the encoder whose states the transformer attends to."""
    config = T5Config(
        vocab_size=vocabulary,
        d_model=TEXT_DIM,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        attn_implementation="eager",
    )
    return T5EncoderModel(config)


def make_pooled_encoder(vocabulary: int) -> CLIPTextModel:
    """Build the encoder whose last state joins the time step."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=POOLED_DIM,
        intermediate_size=2 * POOLED_DIM,
        projection_dim=POOLED_DIM,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=POOLED_LENGTH,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        attn_implementation="eager",
    )
    return CLIPTextModel(config)


def make_tokenizers(sentences: list[str]) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """Build the tokenizers of the pooled and of the other encoder: the same words, other lengths."""
    long = make_tokenizer(sentences)
    short = copy.deepcopy(long)
    short.model_max_length, long.model_max_length = POOLED_LENGTH, TEXT_LENGTH
    return short, long


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Build the sampler."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def packed(latents: Tensor) -> Tensor:
    """Tokens [B, H/2 * W/2, 4 C] of latents [B, C, H, W], as `FluxPipeline` packs them."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def picture_places(side: int, device: torch.device) -> Tensor:
    """Positions [side * side, 3] of picture tokens."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.zeros_like(x), y, x], -1).view(-1, 3).to(device, torch.float32)


def count(*modules: nn.Module) -> float:
    """Parameters in millions."""
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6
