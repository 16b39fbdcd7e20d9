"""Tiny random models of ComfyUI itself under our node; run by ``test_server.py`` with ComfyUI's interpreter.

Prints one JSON line: for each model its geometry, sparse calls, and the distance from dense at density 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

sys.path[:0] = sys.argv[1:4]  # ComfyUI, kernels and patches
ROOT = sys.argv[4]
sys.path.append(ROOT)
sys.argv = [sys.argv[0], "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.ops  # noqa: E402
import torch  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402

from dit_accel_patches.comfyui.patching import accelerate, session_of  # noqa: E402
from dit_accel_patches.comfyui.settings import Settings  # noqa: E402

SETTINGS = Settings(quality="custom", density=1.0, min_tokens=0, start_percent=0.0)
COMMON: dict[str, Any] = {"operations": comfy.ops.disable_weight_init, "device": "cpu", "dtype": torch.float32}
FLUX: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 32,
    "context_in_dim": 48,
    "hidden_size": 128,
    "mlp_ratio": 2.0,
    "num_heads": 1,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": False,
}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def wan() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    from comfy.ldm.wan.model import WanModel

    model = WanModel("t2v", dim=128, ffn_dim=64, num_heads=1, num_layers=2, text_dim=48, **COMMON)
    return model, (noise(1, 16, 3, 15, 16), torch.ones(1), noise(1, 7, 48)), {}


def wan_reference() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    from comfy.ldm.wan.model import WanModel

    model = WanModel("t2v", dim=128, ffn_dim=64, num_heads=1, num_layers=1, text_dim=48, in_dim_ref_conv=16, **COMMON)
    return model, (noise(1, 16, 3, 16, 16), torch.ones(1), noise(1, 7, 48)), {"reference_latent": noise(1, 16, 16, 16)}


def flux() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    from comfy.ldm.flux.model import Flux

    model = Flux(patch_size=2, **FLUX, **COMMON)
    call = {"y": noise(1, 32), "ref_latents": [noise(1, 16, 8, 8)]}
    return model, (noise(1, 16, 31, 32), torch.ones(1), noise(1, 9, 48)), call


def hunyuan() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    from comfy.ldm.hunyuan_video.model import HunyuanVideo, HunyuanVideoParams

    new = {"byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None}
    known = {field.name for field in fields(HunyuanVideoParams)}
    options = {**FLUX, "patch_size": [1, 2, 2], **{key: value for key, value in new.items() if key in known}}
    model = HunyuanVideo(**options, **COMMON)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0, 0]])
    call = {"y": noise(1, 32), "attention_mask": mask}
    return model, (noise(1, 16, 3, 16, 16), torch.ones(1), noise(1, 9, 48)), call


def hidream() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    from comfy.ldm.hidream.model import HiDreamImageTransformer2DModel

    model = HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=64,
        num_attention_heads=2, caption_channels=[48, 48], text_emb_dim=32, num_routed_experts=1,
        num_activated_experts=1, axes_dims_rope=(32, 16, 16), max_resolution=(64, 64), llama_layers=[0, 1], **COMMON,
    )  # fmt: skip
    call = {"y": noise(1, 32), "encoder_hidden_states_llama3": noise(1, 2, 6, 48)}
    return model, (noise(1, 16, 30, 32), torch.ones(1)), {**call, "context": noise(1, 9, 48)}


def chroma() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    from comfy.ldm.chroma.model import Chroma

    options = {key: value for key, value in FLUX.items() if key not in ("vec_in_dim", "guidance_embed")}
    options.update(in_channels=64, out_channels=64)  # channels of a whole patch, unlike FLUX
    model = Chroma(**options, patch_size=2, in_dim=64, out_dim=128, hidden_dim=64, n_layers=2, **COMMON)
    return model, (noise(1, 16, 30, 32), torch.ones(1), noise(1, 9, 48), torch.zeros(1)), {}


def ltx() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    from comfy.ldm.lightricks.model import LTXVModel

    model = LTXVModel(
        in_channels=16,
        cross_attention_dim=128,
        attention_head_dim=64,
        num_attention_heads=2,
        caption_channels=48,
        num_layers=2,
        **COMMON,
    )
    return model, (noise(1, 16, 3, 8, 8), torch.ones(1, 1), noise(1, 7, 48), None), {}


def qwen() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        in_channels=64, num_layers=2, num_attention_heads=1, joint_attention_dim=48, **COMMON
    )
    return model, (noise(1, 16, 1, 30, 32), torch.ones(1), noise(1, 9, 48)), {"ref_latents": [noise(1, 16, 1, 8, 8)]}


def lumina() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    from comfy.ldm.lumina.model import NextDiT

    model = NextDiT(
        in_channels=16, dim=192, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=1, cap_feat_dim=48,
        qk_norm=True, axes_dims=[32, 32, 32], axes_lens=[64, 64, 64], **COMMON,
    )  # fmt: skip
    return model, (noise(1, 16, 30, 32), torch.ones(1) * 0.5, noise(1, 9, 48), 9), {}


def z_image() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    from comfy.ldm.lumina.model import NextDiT

    model = NextDiT(
        in_channels=16, dim=256, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=48,
        qk_norm=True, axes_dims=[32, 48, 48], axes_lens=[64, 64, 64], pad_tokens_multiple=32, z_image_modulation=True,
        **COMMON,
    )  # fmt: skip
    return model, (noise(1, 16, 30, 32), torch.ones(1) * 0.5, noise(1, 33, 48), 33), {}


def aura() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    from comfy.ldm.aura.mmdit import MMDiT

    model = MMDiT(
        in_channels=16, out_channels=16, dim=128, n_layers=3, n_double_layers=1, n_heads=2, global_conddim=128,
        cond_seq_dim=48, max_seq=32 * 32, **COMMON,
    )  # fmt: skip
    return model, (noise(1, 16, 31, 32), torch.ones(1), noise(1, 9, 48)), {}


def cosmos() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    from comfy.ldm.cosmos.predict2 import MiniTrainDIT

    model = MiniTrainDIT(
        max_img_h=64, max_img_w=64, max_frames=16, in_channels=16, out_channels=16, patch_spatial=2, patch_temporal=1,
        concat_padding_mask=False, model_channels=128, num_blocks=2, num_heads=1, crossattn_emb_channels=48,
        pos_emb_cls="rope3d", image_model=None, **COMMON,
    )  # fmt: skip
    return model, (noise(1, 16, 3, 16, 16), torch.ones(1), noise(1, 9, 48)), {}


MODELS: tuple[Callable[[], tuple[Any, tuple[Any, ...], dict[str, Any]]], ...] = (
    wan, wan_reference, flux, chroma, hunyuan, ltx, qwen, lumina, z_image, hidream, aura, cosmos,
)  # fmt: skip


def check(make: Callable[[], tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> dict[str, Any]:
    torch.manual_seed(0)
    model, args, kwargs = make()
    for name, value in model.named_parameters():
        scale = 0.05 if value.ndim > 1 else 0.1
        value.data = torch.randn_like(value) * scale + ("norm" in name and value.ndim == 1)
    sampling = SimpleNamespace(percent_to_sigma=lambda percent: 1.0 - percent)
    holder = torch.nn.Module()
    holder.diffusion_model, holder.model_sampling = model, sampling
    patcher = accelerate(ModelPatcher(holder, torch.device("cpu"), torch.device("cpu")), SETTINGS)
    sigmas = torch.linspace(1, 0, 5)

    def options(patched: bool) -> dict[str, Any]:
        told = {"sample_sigmas": sigmas, "sigmas": sigmas[:1], "uuids": ["a"], "cond_or_uncond": [0]}
        more = {"wrappers": patcher.wrappers, **patcher.model_options["transformer_options"]} if patched else {}
        return {**told, **more}

    with torch.no_grad():
        dense = model(*args, transformer_options=options(False), **kwargs)
        got = model(*args, transformer_options=options(True), **kwargs)
    statuses = session_of(patcher).status()
    return {
        "error": ((got - dense).norm() / dense.norm()).item(),
        "geometry": [s.geometry for s in statuses],
        "sparse": sum(s.sparse_calls for s in statuses),
        "reasons": [reason for s in statuses for reason in s.reasons],
    }


if __name__ == "__main__":
    found = {}
    for make in MODELS:
        try:
            found[make.__name__] = check(make)
        except (AttributeError, ImportError, TypeError) as error:  # built otherwise in this version
            found[make.__name__] = {"unbuilt": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(found) + "\n")
