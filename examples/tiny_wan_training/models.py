"""The four parts of the tiny pipeline, untrained.

A VAE that halves time and quarters height and width, so that 65 frames of 128 x 128 become 33 x 32 x 32
latents and, with patches of (1, 2, 2), 33 x 16 x 16 = 8,448 tokens of self-attention. `WanPipeline` only
asks for `1 + k * scale_factor_temporal` frames; without a stride in time it would silently add one frame.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

Z_DIM = 8
TEXT_DIM = 128
#: `WanPipeline` pads the text to this many positions with zero vectors, and attends to all of them.
TEXT_LENGTH = 512


def make_vae(mean: list[float] | None = None, std: list[float] | None = None) -> AutoencoderKLWan:
    """Build the VAE; `mean` and `std` are the measured moments of its latents."""
    vae = AutoencoderKLWan(
        base_dim=24,
        z_dim=Z_DIM,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        latents_mean=mean or [0.0] * Z_DIM,
        latents_std=std or [1.0] * Z_DIM,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )
    with torch.no_grad():
        vae.quant_conv.bias[Z_DIM:] = -4.0  # begin with little noise, so that there is a signal to learn from
    return vae


def make_transformer(heads: int = 5, layers: int = 7, ffn_dim: int = 768) -> WanTransformer3DModel:
    """Build the transformer, started as diffusion transformers like it.

    The modulation starts at zero with small open gates, and the output at zero.
    """
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=64,
        in_channels=Z_DIM,
        out_channels=Z_DIM,
        text_dim=TEXT_DIM,
        freq_dim=256,
        ffn_dim=ffn_dim,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=128,
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        embedder = model.condition_embedder
        nn.init.zeros_(embedder.time_proj.weight)
        nn.init.normal_(embedder.time_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(embedder.time_embedder.linear_2.weight, std=0.02)
        for block in model.blocks:
            block.scale_shift_table.zero_()
            block.scale_shift_table[:, [2, 5]] = 0.3
            block.attn2.to_out[0].weight.mul_(0.3)
        model.scale_shift_table.zero_()
        nn.init.zeros_(model.proj_out.weight)
    return model


def make_tokenizer(sentences: list[str]) -> PreTrainedTokenizerFast:
    """Build a tokenizer that knows every word of `sentences` and spells the others."""
    words = sorted({word for sentence in sentences for word in sentence.lower().split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [(chr(code), -10.0) for code in range(33, 127)]
    pieces += [("▁" + word, -2.0) for word in words]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_LENGTH,
        padding_side="right",
    )


def make_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """Build the text encoder."""
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_DIM,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return UMT5EncoderModel(config)


def make_scheduler() -> UniPCMultistepScheduler:
    """Build the sampler, as Wan ships it."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def encode_text(encoder: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Embed tokens as `WanPipeline` does: padding becomes zero vectors, up to `TEXT_LENGTH`."""
    states = encoder(ids, mask).last_hidden_state
    states = states * mask.unsqueeze(-1).to(states.dtype)
    return nn.functional.pad(states, (0, 0, 0, TEXT_LENGTH - states.shape[1]))


def count(module: Any) -> float:
    """Parameters in millions."""
    return sum(p.numel() for p in module.parameters()) / 1e6
