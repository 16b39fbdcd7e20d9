"""PAROAttention's static plans: calibration, use, files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_accel

Generate = Callable[..., Tensor]


class _Prompted:
    """The pipeline called by prompt, as ``calibrate`` does."""

    def __init__(self, pipe: Any, generate: Generate) -> None:
        self.transformer = pipe.transformer
        self.scheduler = pipe.scheduler
        self.seen: list[str] = []
        self._generate = generate

    def __call__(self, prompt: str, **options: Any) -> Tensor:
        self.seen.append(prompt)
        return self._generate(**options)


@pytest.fixture
def plan(pipe: Any, generate: Generate) -> dit_accel.StaticPlan:
    overrides = {"density": 0.4}
    return dit_accel.calibrate(_Prompted(pipe, generate), ["a", "b"], overrides=overrides, steps=6)


def test_calibration_makes_masks_for_the_first_half_and_one_for_the_rest(plan: dit_accel.StaticPlan) -> None:
    assert plan.steps == 6
    assert plan.geometry.grid == (5, 8, 8)
    assert tuple(plan.bits.shape) == (4, 2, 2, 5, 1)  # masks, layers, heads, block rows, words
    assert [plan.mask_index(dit_accel.StepInfo(step=i, steps=6)) for i in range(6)] == [0, 1, 2, 3, 3, 3]
    assert [plan.mask_index(dit_accel.StepInfo(step=i, steps=12)) for i in (0, 1, 2, 5, 6, 11)] == [0, 0, 1, 2, 3, 3]


def test_each_prompt_runs_dense_twice(pipe: Any, generate: Generate) -> None:
    prompted = _Prompted(pipe, generate)
    original = pipe.transformer.blocks[0].attn1.processor
    dit_accel.calibrate(prompted, ["x"], steps=4)
    assert prompted.seen == ["x", "x"]
    assert pipe.transformer.blocks[0].attn1.processor is original


def test_static_plan_runs_sparse_from_the_first_step(pipe: Any, generate: Generate, plan: dit_accel.StaticPlan) -> None:
    dense = generate(steps=6)
    with dit_accel.enable(pipe, "paro", plan=plan, min_tokens=0) as handle:
        out = generate(steps=6)
        status = handle.stats()["transformer"]
    assert status.sparse_calls == status.calls == 24
    assert 0.3 < status.density < 0.75  # the last block row and column are forced
    assert 0 < float((out - dense).norm() / dense.norm()) < 0.3


def test_full_static_plan_equals_dense(pipe: Any, generate: Generate) -> None:
    full = dit_accel.calibrate(_Prompted(pipe, generate), ["a"], overrides={"density": 1.0}, steps=3)
    dense = generate(steps=3)
    with dit_accel.enable(pipe, "paro", plan=full, min_tokens=0):
        torch.testing.assert_close(generate(steps=3), dense, atol=1e-5, rtol=1e-5)


def test_file_round_trip(plan: dit_accel.StaticPlan, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    again = dit_accel.StaticPlan.load(path)
    assert again.method == plan.method
    assert (again.geometry, again.steps, again.model) == (plan.geometry, plan.steps, plan.model)
    assert torch.equal(again.bits, plan.bits)
    assert torch.equal(again.head_choice, plan.head_choice)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.safetensors"]


def test_bad_files_are_refused(plan: dit_accel.StaticPlan, tmp_path: Path, pipe: Any) -> None:
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="is not a readable static plan"):
        dit_accel.enable(pipe, "paro", plan=path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is not a static plan of dit_accel"):
        dit_accel.StaticPlan.load(path)
    path.write_bytes(data.replace(b'\\"version\\": 1, \\"method\\"', b'\\"version\\": 9, \\"method\\"'))
    with pytest.raises(ValueError, match="reads up to 1"):
        dit_accel.StaticPlan.load(path)
    with pytest.raises(FileNotFoundError, match="no static plan at"):
        dit_accel.StaticPlan.load(tmp_path / "none.safetensors")


def test_another_geometry_stays_dense_with_the_reason(
    pipe: Any, generate: Generate, plan: dit_accel.StaticPlan
) -> None:
    other = dit_accel.StaticPlan(
        plan.method, plan.model, dit_accel.TokenGeometry((9, 8, 8)), plan.steps, plan.head_choice, plan.bits
    )
    with dit_accel.enable(pipe, "paro", plan=other, min_tokens=0) as handle:
        generate(steps=2)
        reasons = handle.stats()["transformer"].reasons
    assert list(reasons) == ["the static plan was made for 9x8x8, this run has 5x8x8"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.9}, "a static plan fixes the method; density must be given to calibrate"),
        ({"run_density": 0.9}, "run_density must be given to calibrate"),
        ({"method": "auto"}, "made for method 'paro', got method='auto'"),
    ],
)
def test_other_wishes_beside_a_plan_raise(
    pipe: Any, plan: dit_accel.StaticPlan, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        dit_accel.enable(pipe, **{"method": "paro", "plan": plan, **options})


def test_plans_of_others_raise(pipe: Any, plan: dit_accel.StaticPlan) -> None:
    with pytest.raises(ValueError, match="plan= names 'transfomer'"):
        dit_accel.enable(pipe, "paro", plan={"transfomer": plan})
    plan.model = "FluxTransformer2DModel"
    with pytest.raises(ValueError, match="made for FluxTransformer2DModel"):
        dit_accel.enable(pipe, "paro", plan=plan)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one prompt"),
        ("a prompt", {}, "list of at least one prompt"),
        (["a"], {"method": "adaspa"}, "needs no calibration"),
        (["a"], {"component": "unet"}, "component must be one of transformer"),
    ],
)
def test_bad_calibration(pipe: Any, prompts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dit_accel.calibrate(pipe, prompts, **options)
