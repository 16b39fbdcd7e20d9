"""Windows per head found by calibration: candidates, their recall, the plan and its file."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_accel
from dit_accel.geometry import TokenGeometry
from dit_accel.order import order_index
from dit_accel.pattern import PatternContext
from dit_accel.pattern.sta import candidates
from dit_accel.pattern_search import candidate_levels, window_recall
from dit_accel.planner import Planner
from dit_accel.presets import get_method

diffusers = pytest.importorskip("diffusers")
OPTIONS = {"score": "sta:tile=1x4x4", "order": ("brick:1x4x4",), "block_q": 16, "block_k": 16, "density": 0.4}


def test_candidates_cost_about_the_same_and_cannot_grow() -> None:
    geometry = TokenGeometry((8, 16, 24))
    method = get_method("sta_search").replace(density=0.3)
    made = candidates(PatternContext(method, geometry, order_index("brick", geometry), 0.3, 2))
    shares = [float((pattern.levels > 0).float().mean()) for pattern in made]
    assert len(made) > 3
    assert max(shares) <= 0.3
    for a, b in itertools.combinations(made, 2):
        assert bool(((a.levels > 0) & (b.levels == 0)).any())
        assert bool(((b.levels > 0) & (a.levels == 0)).any())


def test_recall_equals_loops() -> None:
    gen = torch.Generator().manual_seed(0)
    mass = torch.rand(3, 5, 5, generator=gen)
    levels = (torch.rand(4, 5, 5, generator=gen) < 0.5).to(torch.uint8)
    found = window_recall(mass, levels)
    for n, head in itertools.product(range(4), range(3)):
        kept = sum(float(mass[head, i, j]) for i in range(5) for j in range(5) if levels[n, i, j])
        assert float(found[n, head]) == pytest.approx(kept / float(mass[head].sum()), rel=1e-5)


class _Pipe:
    """A tiny random Wan pipeline of 4 x 8 x 12 tokens, called by prompt as ``calibrate`` does."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.transformer = diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=3,
            attention_head_dim=32,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=64,
            ffn_dim=64,
            num_layers=2,
            rope_max_seq_len=64,
        ).eval()
        vae = diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.scheduler = scheduler
        self.pipe = diffusers.WanPipeline(
            tokenizer=None, text_encoder=None, transformer=self.transformer, vae=vae, scheduler=scheduler
        )
        self.pipe.set_progress_bar_config(disable=True)
        self.calls = 0

    def __call__(self, prompt: str = "", steps: int = 5) -> Tensor:
        self.calls += 1
        text = torch.randn(2, 1, 16, 32, generator=torch.Generator().manual_seed(len(prompt)))
        frames = self.pipe(
            prompt_embeds=text[0],
            negative_prompt_embeds=text[1],
            height=128,
            width=192,
            num_frames=13,
            num_inference_steps=steps,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames
        assert isinstance(frames, Tensor)
        return frames


@pytest.fixture
def pipe() -> _Pipe:
    return _Pipe()


def _calibrated(pipe: _Pipe, **overrides: Any) -> dit_accel.StaticPlan:
    return dit_accel.calibrate(pipe, ["a", "bb"], "sta_search", overrides={**OPTIONS, **overrides}, steps=5)


def test_each_head_takes_the_window_that_keeps_most_mass(pipe: _Pipe, tmp_path: Path) -> None:
    plan = _calibrated(pipe)
    assert pipe.calls == 2  # one pass suffices
    assert plan.windows is not None
    assert tuple(plan.windows.shape) == (1, 2, 3)
    levels = candidate_levels(Planner(plan.method), plan.geometry, 3)
    assert int(plan.windows.max()) < len(levels)
    shifts = torch.arange(32, dtype=torch.int32)
    bits = ((plan.bits[0][..., None] >> shifts) & 1).flatten(-2)[..., : levels.shape[-1]]
    for layer, head in itertools.product(range(2), range(3)):
        assert torch.equal(bits[layer, head], (levels[plan.windows[0, layer, head]] > 0).int())
    path = tmp_path / "sta.safetensors"
    plan.save(path)
    again = dit_accel.StaticPlan.load(path)
    assert again.windows is not None
    assert torch.equal(again.windows, plan.windows)
    assert torch.equal(again.bits, plan.bits)


def test_the_plan_runs_behind_a_dense_warm_up(pipe: _Pipe) -> None:
    plan = _calibrated(pipe)
    dense = pipe()
    with dit_accel.enable(pipe, "sta_search", plan=plan, min_tokens=0) as handle:
        out = pipe()
        status = handle.stats()["transformer"]
    assert status.calls == 20
    assert status.sparse_calls == 12  # 2 of 5 steps are the warm-up, of two layers and two branches
    assert status.reasons == {"warm-up": 8}
    assert status.density == pytest.approx(0.4 + 0.6 * 0.4, abs=0.06)
    assert 0 < float((out - dense).norm() / dense.norm()) < 0.5


def test_full_windows_are_dense_and_steps_may_have_their_own(pipe: _Pipe) -> None:
    plan = _calibrated(pipe, density=1.0, static_share=0.8, warmup=0.0)
    assert plan.bits.shape[0] == 5
    dense = pipe()
    with dit_accel.enable(pipe, "sta_search", plan=plan, min_tokens=0):
        torch.testing.assert_close(pipe(), dense, atol=1e-5, rtol=1e-5)
    late = _calibrated(pipe, static_share=0.8)
    assert torch.equal(late.bits[0], late.bits[2])  # the warm-up has no windows of its own


def test_sta_needs_no_plan_and_sta_search_does(pipe: _Pipe) -> None:
    with pytest.raises(ValueError, match="'sta_search' is static: make a plan first"):
        dit_accel.enable(pipe, "sta_search")
    with dit_accel.enable(pipe, "sta", min_tokens=0, **{**OPTIONS, "density": 0.4}) as handle:
        pipe()
        status = handle.stats()["transformer"]
        assert status.sparse_calls == 12
        assert status.density == pytest.approx(0.4 + 0.6 * 0.5, abs=0.01)  # 3 x 2 x 2 of 4 x 2 x 3 tiles come nearest
