"""What each of two processes does: models run alone, then spread over both, with gloo on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import dit_accel
from dit_accel.geometry import TokenGeometry
from dit_accel.presets import get_method
from dit_accel.static_plan import StaticPlan
from dit_accel_kernels.lists import pack_bits

SIZE = 2
TIMESTEPS = (1000.0, 700.0, 400.0, 100.0)


def wan(heads: int = 4) -> nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    options: dict[str, Any] = {"patch_size": (1, 2, 2), "in_channels": 4, "out_channels": 4, "text_dim": 16}
    options |= {"freq_dim": 32, "ffn_dim": 32, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}
    return WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=12, num_layers=2, rope_max_seq_len=32, **options
    ).eval()


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    options: dict[str, Any] = {"patch_size": 1, "in_channels": 4, "joint_attention_dim": 16}
    options |= {"pooled_projection_dim": 16, "axes_dims_rope": [4, 4, 8]}
    return FluxTransformer2DModel(
        num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=4, **options
    ).eval()


def qwen() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    options: dict[str, Any] = {"patch_size": 2, "in_channels": 16, "out_channels": 4, "joint_attention_dim": 16}
    return QwenImageTransformer2DModel(
        num_layers=2, attention_head_dim=16, num_attention_heads=4, axes_dims_rope=(8, 4, 4), **options
    ).eval()


def wan_call(model: nn.Module, timestep: float, frames: int = 5, batch: int = 1) -> Tensor:
    made = torch.Generator().manual_seed(1)
    latent = torch.randn(batch, 4, frames, 16, 24, generator=made)
    text = torch.randn(batch, 7, 16, generator=made)
    times = torch.full((batch,), timestep)
    return model(hidden_states=latent, timestep=times, encoder_hidden_states=text, return_dict=False)[0]


def flux_call(
    model: nn.Module, timestep: float, text: int = 16, height: int = 16, width: int = 20, reference: int = 0
) -> Tensor:
    made = torch.Generator().manual_seed(1)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.stack((torch.zeros_like(rows), rows, columns), -1).flatten(0, 1).float()
    if reference:
        ids = torch.cat(
            (ids, torch.stack([torch.ones(reference), torch.arange(reference), torch.zeros(reference)], -1))
        )
    return model(
        hidden_states=torch.randn(1, len(ids), 4, generator=made),
        encoder_hidden_states=torch.randn(1, text, 16, generator=made),
        pooled_projections=torch.randn(1, 16, generator=made),
        timestep=torch.tensor([timestep / 1000]),
        img_ids=ids,
        txt_ids=torch.zeros(text, 3),
        return_dict=False,
    )[0]


def qwen_call(model: nn.Module, timestep: float) -> Tensor:
    made = torch.Generator().manual_seed(1)
    mask = torch.ones(1, 16, dtype=torch.bool)
    mask[:, 11:] = False
    return model(
        hidden_states=torch.randn(1, 320, 16, generator=made),
        encoder_hidden_states=torch.randn(1, 16, 16, generator=made),
        encoder_hidden_states_mask=mask,
        timestep=torch.tensor([timestep / 1000]),
        img_shapes=[[(1, 16, 20)]],
        return_dict=False,
    )[0]


@dataclass(frozen=True)
class Scenario:
    """One model and method, alone and spread.

    Attributes:
        make: builds the model, the same each time.
        call: one forward call.
        enable: arguments of :func:`dit_accel.enable`.
        parallel: arguments of ``ContextParallelConfig``.
        first: what comes first, ``"enable"`` or ``"parallel"``.
        compiled: whether blocks are compiled.
        after: whether diffusers itself can run the model spread, once ours is disabled.
        timesteps: of the forward calls.
        options: further arguments of ``call``.
    """

    make: Callable[[], nn.Module]
    call: Callable[..., Tensor]
    enable: dict[str, Any]
    parallel: dict[str, Any] = field(default_factory=lambda: {"ulysses_degree": SIZE})
    first: str = "enable"
    compiled: bool = False
    after: bool = True
    timesteps: tuple[float, ...] = TIMESTEPS
    options: dict[str, Any] = field(default_factory=dict)


def settings(method: str | None, **more: Any) -> dict[str, Any]:
    """Arguments of ``enable`` at this size."""
    return {"method": method, "min_tokens": 0, "backend": "reference", "block_q": 16, "block_k": 16, **more}


def static_plan() -> StaticPlan:
    """Random orders and masks for each head of the Wan above, as calibration would have found them."""
    made, method, grid = torch.Generator().manual_seed(2), get_method("paro"), (5, 8, 12)
    blocks = -(-(grid[0] * grid[1] * grid[2]) // method.block_q)
    levels = (torch.rand(1, 2, 4, blocks, blocks, generator=made) < 0.4) | torch.eye(blocks, dtype=torch.bool)
    choice = torch.randint(0, len(method.order), (2, 4), generator=made, dtype=torch.int32)
    bits = pack_bits(levels.to(torch.uint8))
    return StaticPlan(method, "WanTransformer3DModel", TokenGeometry(grid), len(TIMESTEPS), choice, bits)


#: Those that every test run does.
CORE = ("wan auto", "wan five heads top_p", "flux adaspa parallel first")
SCENARIOS: dict[str, Scenario] = {
    "wan auto": Scenario(wan, wan_call, settings("auto", density=0.3)),
    "wan static": Scenario(
        wan, wan_call, {"method": "paro", "min_tokens": 0, "backend": "reference", "plan": static_plan()}
    ),
    "wan radial": Scenario(wan, wan_call, settings("radial")),
    "wan top_p": Scenario(wan, wan_call, settings(None, score="mass", select="top_p:0.6", reuse="every:1")),
    "wan top_p density": Scenario(wan, wan_call, settings(None, score="mass", select="top_p", density=0.4)),
    "wan svg2": Scenario(wan, wan_call, settings("svg2", density=0.5, order="kmeans:6")),
    "wan similar": Scenario(
        wan, wan_call, settings("auto", density=0.3, reuse="similar:0.99999"), timesteps=(*TIMESTEPS, 60.0, 40.0, 20.0)
    ),
    "wan three heads": Scenario(lambda: wan(3), wan_call, settings("adaspa", density=0.3), after=False),
    "wan five heads top_p": Scenario(
        lambda: wan(5),
        wan_call,
        settings(None, score="mass", select="top_p:0.6", order="axes", reuse="every:2"),
        after=False,
    ),
    "wan batch of two": Scenario(
        lambda: wan(3), wan_call, settings("adaspa", density=0.3), after=False, options={"batch": 2}
    ),
    "wan ring": Scenario(wan, wan_call, settings("auto", density=0.3), {"ring_degree": SIZE}, after=False),
    "wan ring anything": Scenario(
        wan,
        wan_call,
        settings("adaspa", density=0.3),
        {"ring_degree": SIZE, "ring_anything": True},
        after=False,
        options={"frames": 3},
    ),
    "flux ring": Scenario(flux, flux_call, settings("auto", density=0.3), {"ring_degree": SIZE}, after=False),
    "wan anything": Scenario(
        wan,
        wan_call,
        settings("auto", density=0.3),
        {"ulysses_degree": SIZE, "ulysses_anything": True},
        options={"frames": 3},
    ),
    "flux auto": Scenario(flux, flux_call, settings("auto", density=0.3)),
    "flux adaspa parallel first": Scenario(flux, flux_call, settings("adaspa", density=0.3), first="parallel"),
    "flux reference": Scenario(flux, flux_call, settings("auto", density=0.3), options={"reference": 30}),
    "flux anything": Scenario(
        flux,
        flux_call,
        settings("auto", density=0.3),
        {"ulysses_degree": SIZE, "ulysses_anything": True},
        options={"text": 17},
    ),
    "qwen mask": Scenario(qwen, qwen_call, settings("auto", density=0.3)),
    "wan proxy": Scenario(wan, wan_call, settings("proxy")),
    "wan compiled": Scenario(wan, wan_call, settings("auto", density=0.3), compiled=True, after=False),
}


def spread(model: nn.Module, **config: Any) -> None:
    """What a user writes, with a mesh since this is the CPU."""
    from diffusers import ContextParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    torch.accelerator.device_count = lambda: SIZE  # type: ignore[assignment]  # diffusers divides by it
    shape = (config.get("ring_degree", 1), config.get("ulysses_degree", 1))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("ring", "ulysses"))
    model.enable_parallelism(config=ContextParallelConfig(**config, mesh=mesh))


def execute(scenario: Scenario, *, parallel: bool) -> dict[str, Any]:
    """Run a model over its timesteps."""
    model = scenario.make()
    kept = [block.attn1.processor for block in getattr(model, "blocks", [])]
    if parallel and scenario.first == "parallel":
        spread(model, **scenario.parallel)
    handle = dit_accel.enable(model, **scenario.enable)
    if parallel and scenario.first == "enable":
        spread(model, **scenario.parallel)
    if scenario.compiled:
        # Not as one graph: the hook of diffusers that splits the input of the first block breaks it.
        model.compile_repeated_blocks(backend="eager")
    with torch.no_grad():
        out = [scenario.call(model, t, **scenario.options) for t in scenario.timesteps]
    status = handle.stats()["transformer"]
    plans = [state.plan for state in handle.runs["transformer"]._states.values()]
    moved = sum(
        plan is not None and plan.placement is not None and plan.placement.placement is not None for plan in plans
    )
    handle.disable()
    restored = [block.attn1.processor for block in getattr(model, "blocks", [])]
    after = out[0]
    if scenario.after:
        with torch.no_grad():
            after = scenario.call(model, scenario.timesteps[0], **scenario.options)
    return {
        "out": torch.stack(out),
        "status": status,
        "after": after,
        "moved": moved,
        "restored": all(a is b for a, b in zip(kept, restored, strict=True)),
    }


def run_all(rank: int, folder: str, names: list[str]) -> None:
    """Entry point of a process: all scenarios, written to ``folder``."""
    torch.set_num_threads(1)
    store = (Path(folder) / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=SIZE)
    results: dict[str, Any] = {}
    try:
        for name in names:
            alone = execute(SCENARIOS[name], parallel=False)
            try:
                results[name] = alone, execute(SCENARIOS[name], parallel=True)
            except Exception as error:
                results[name] = alone, repr(error)
        dist.barrier()
    finally:
        torch.save(results, Path(folder) / f"rank{rank}.pt")
        dist.destroy_process_group()
