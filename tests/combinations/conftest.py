"""Tiny random pipelines, accelerated for real: 320 tokens in blocks of 16, about a third of them computed.

Every test that stands for a row of ``docs/compatibility.md`` says so with the mark ``combination``; see
``scripts/compatibility_page.py``, which reads the marks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_accel
from dit_accel.ledger import RunStatus
from dit_accel.method import Method

diffusers = pytest.importorskip("diffusers")
# Tensors of a few numbers: threads only get into each other's way.
torch.set_num_threads(1)

#: Plans from exact mass, keeps the rest as means; the first step is dense and plans.
METHOD = Method(
    name="test", order="gilbert", score="mass", density=0.3, compensate="mean", warmup=0.15, block_q=16, block_k=16
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "combination(group, name, result, note): a row of the table of combinations (docs/compatibility.md)"
    )


def wan_transformer(layers: int = 2) -> nn.Module:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=64,
        ffn_dim=64,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    ).eval()


def flux_transformer() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    ).eval()


def cogvideox_transformer() -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=16,
        sample_height=16,
        sample_frames=17,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=12,
        use_rotary_positional_embeddings=True,
    ).eval()


def dit_transformer() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        sample_size=32,
        num_layers=2,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        norm_type="ada_norm_zero",
        num_embeds_ada_norm=1000,
    ).eval()


class Tiny:
    """A pipeline, what one call of it needs, and what its transformers looked like before anybody touched them."""

    def __init__(self, pipe: Any, **call: Any) -> None:
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.call = pipe, call
        self.processors = self._processors()

    @property
    def model(self) -> Any:
        """The transformer."""
        return self.pipe.transformer

    def _processors(self) -> dict[str, Any]:
        parts = {n: m for n, m in self.pipe.components.items() if isinstance(m, nn.Module)}
        found = ((f"{n}.{p}", m) for n, part in parts.items() for p, m in part.named_modules())
        return {path: module.processor for path, module in found if hasattr(module, "processor")}

    def __call__(self, pipe: Any = None, **overrides: Any) -> Tensor:
        """One run to the latents, the same noise every time."""
        pipe = pipe or self.pipe
        out = pipe(
            **{**self.call, **overrides},
            generator=torch.Generator().manual_seed(0),
            output_type="np" if isinstance(pipe, diffusers.DiTPipeline) else "latent",
            return_dict=False,
        )[0]
        return torch.as_tensor(out)

    @contextmanager
    def enabled(self, target: Any = None, **changes: Any) -> Iterator[dit_accel.Handle]:
        """Accelerated; afterwards nothing of ours may be left."""
        handle = self.enable(target, **changes)
        try:
            yield handle
        finally:
            handle.disable()
        self.check_restored()

    def enable(self, target: Any = None, **changes: Any) -> dit_accel.Handle:
        return dit_accel.enable(target or self.pipe, METHOD.replace(**changes), min_tokens=0)

    def check_restored(self) -> None:
        """Every processor is the object that it was, and no hook or attribute of ours is on the transformer."""
        now = self._processors()
        assert now.keys() == self.processors.keys()
        assert all(now[path] is self.processors[path] for path in now)
        for module in self.pipe.components.values():
            if isinstance(module, nn.Module):
                assert not [name for name in vars(module) if "dit_accel" in name]
                hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
                assert not [hook for hook in hooks if "dit_accel" in getattr(hook, "__module__", "")]
                assert "dit_accel" not in getattr(getattr(module, "_diffusers_hook", None), "hooks", {})


def _wan(two: bool = False) -> Tiny:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    more: dict[str, Any] = {"transformer_2": wan_transformer(), "boundary_ratio": 0.6} if two else {}
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, transformer=wan_transformer(), vae=vae, scheduler=scheduler, **more
    )
    gen = torch.Generator().manual_seed(1)
    return Tiny(
        pipe,
        prompt_embeds=torch.randn(1, 16, 32, generator=gen),
        negative_prompt_embeds=torch.randn(1, 16, 32, generator=gen),
        height=128,
        width=128,
        num_frames=17,
        num_inference_steps=6 if two else 4,
        guidance_scale=4.0,
    )


def _flux() -> Tiny:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        shift_factor=0.06,
        scaling_factor=1.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    missing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae, transformer=flux_transformer(), **missing
    )
    gen = torch.Generator().manual_seed(1)
    return Tiny(
        pipe,
        prompt_embeds=torch.randn(1, 16, 32, generator=gen),
        pooled_prompt_embeds=torch.randn(1, 32, generator=gen),
        height=32,
        width=40,
        num_inference_steps=4,
    )


def _cogvideox() -> Tiny:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    pipe = diffusers.CogVideoXPipeline(
        text_encoder=None,
        tokenizer=None,
        vae=vae,
        transformer=cogvideox_transformer(),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )
    gen = torch.Generator().manual_seed(1)
    return Tiny(
        pipe,
        prompt_embeds=torch.randn(1, 12, 16, generator=gen),
        negative_prompt_embeds=torch.randn(1, 12, 16, generator=gen),
        height=128,
        width=128,
        num_frames=17,
        num_inference_steps=4,
        guidance_scale=4.0,
    )


def _dit() -> Tiny:
    """No cache context, no end of run, and a scheduler that does not count its steps. Pictures, as it has no latents."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, latent_channels=4, norm_num_groups=1, sample_size=8
    )
    pipe = diffusers.DiTPipeline(transformer=dit_transformer(), vae=vae, scheduler=diffusers.DDIMScheduler())
    return Tiny(pipe, class_labels=[1], num_inference_steps=4, guidance_scale=4.0)


FAMILIES = {
    "wan": _wan,
    "flux": _flux,
    "cogvideox": _cogvideox,
    "dit": _dit,
    "wan22": functools.partial(_wan, two=True),
}


@functools.cache
def _known(name: str, density: float | None) -> Tensor:
    """Latents of a fresh pipeline that nothing else was done to; dense where ``density`` is ``None``."""
    tiny = FAMILIES[name]()
    if density is None:
        return tiny()
    with tiny.enabled(density=density):
        return tiny()


@pytest.fixture(autouse=True)
def _same_backend() -> Iterator[None]:
    """`set_attention_backend` of diffusers changes the default of the process; the next test wants the old one."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    before = registry._active_backend
    yield
    registry._active_backend = before


@pytest.fixture
def make() -> Callable[[str], Tiny]:
    """A fresh pipeline of a family."""
    return lambda name: FAMILIES[name]()


@pytest.fixture
def wan() -> Tiny:
    return _wan()


@pytest.fixture
def flux() -> Tiny:
    return _flux()


@pytest.fixture
def cogvideox() -> Tiny:
    return _cogvideox()


@pytest.fixture
def dit() -> Tiny:
    return _dit()


@pytest.fixture
def wan22() -> Tiny:
    return _wan(two=True)


@pytest.fixture
def dense_of() -> Callable[[str], Tensor]:
    """What a family gives without us and without anything else."""
    return lambda name: _known(name, None).clone()


@pytest.fixture
def sparse_of() -> Callable[[str], Tensor]:
    """What a family gives with us and without anything else."""
    return lambda name: _known(name, METHOD.density).clone()


@pytest.fixture
def group_offload() -> Callable[..., None]:
    """`enable_group_offload` from the CPU to the CPU, which older versions of diffusers cannot do."""

    def offload(model: Any, kind: str = "leaf_level") -> None:
        cpu = torch.device("cpu")
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        try:
            model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks)
        except AttributeError as error:
            pytest.skip(f"group offload of diffusers {diffusers.__version__} needs an accelerator: {error}")

    return offload


@pytest.fixture
def knows_steps() -> bool:
    """Whether diffusers tells the step to whoever asks, which it does since 0.40, and not the branch alone."""
    return hasattr(diffusers.hooks.hooks, "CacheContext")


@pytest.fixture
def ran_sparse() -> Callable[..., RunStatus]:
    """Assert that the latest run was sparse where the schedule says so, and return its status."""

    def check(handle: dit_accel.Handle, component: str = "transformer", *, at_least: float = 0.7) -> RunStatus:
        status = handle.stats()[component]
        assert status.calls > 0
        assert status.sparse_calls >= at_least * status.calls
        assert status.sparse_density < 0.5
        assert status.density < 1.0
        return status

    return check
