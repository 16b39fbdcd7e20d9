"""What every preset must hold, on shapes of video, HunyuanVideo and FLUX."""

from __future__ import annotations

import pytest
import torch
from problems import FLUX, GEOMETRIES, HUNYUAN, VIDEO, make_plan, qkv, run
from torch.nn import functional as F

from dit_accel.geometry import TokenGeometry
from dit_accel.plan import Plan
from dit_accel.presets import get_method, load_methods

NAMES = sorted(name for name, method in load_methods().items() if not method.is_dense)
#: These answer to a density only in the steps that their geometry offers.
COARSE = {name for name in NAMES if get_method(name).is_geometric}
#: These are as near to dense attention as their number formats are; tests/precision says how near.
NARROW = {name for name in NAMES if not get_method(name).precision_rule.wide}


def _parts(plan: Plan) -> tuple[Plan, ...]:
    return plan.parts or (plan,)


def _work(plan: Plan) -> float:
    return float(plan.density.mean()) + float(torch.as_tensor(plan.gathered_density).float().mean())


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_no_row_is_empty_and_text_is_exact(name: str, geometry: TokenGeometry) -> None:
    tensors = qkv(geometry, batch=2)
    plan = make_plan(name, geometry, tensors, density=0.3)
    for part in _parts(plan):
        levels = part.mask.levels()
        assert (levels.sum(-1) > 0).all()
        share = part.mask.density()
        torch.testing.assert_close(part.density, share)
    out = run(plan, tensors)
    assert torch.isfinite(out).all()
    if geometry.extra and get_method(name).compensate != "residual" and name not in NARROW:
        dense = F.scaled_dot_product_attention(*tensors)
        text = torch.ones(geometry.tokens, dtype=torch.bool)
        text[geometry.visual_slice] = False
        torch.testing.assert_close(out[:, :, text], dense[:, :, text], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in COARSE | NARROW])
def test_density_one_is_dense(name: str) -> None:
    tensors = qkv(HUNYUAN)
    plan = make_plan(name, HUNYUAN, tensors, density=1.0)
    torch.testing.assert_close(run(plan, tensors), F.scaled_dot_product_attention(*tensors), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("density", [0.5, 0.3])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in COARSE])
def test_an_asked_density_is_met(name: str, density: float) -> None:
    geometry = TokenGeometry((8, 16, 16))
    plan = make_plan(name, geometry, qkv(geometry), density=density)
    assert _work(plan) == pytest.approx(density, abs=0.075)


@pytest.mark.parametrize("name", NAMES)
def test_padding_is_never_seen(name: str) -> None:
    """The last text tokens are padding: what they hold changes nothing."""
    tensors = qkv(HUNYUAN)
    valid = torch.ones(1, HUNYUAN.tokens, dtype=torch.bool)
    valid[:, -25:] = False
    plan = make_plan(name, HUNYUAN, tensors, key_valid=valid, density=0.4)
    out = run(plan, tensors, valid)
    q, k, v = (x.clone() for x in tensors)
    k[:, :, -25:], v[:, :, -25:] = 7.0, -9.0
    plan = make_plan(name, HUNYUAN, (q, k, v), key_valid=valid, density=0.4)
    seen = valid[0]
    torch.testing.assert_close(run(plan, (q, k, v), valid)[:, :, seen], out[:, :, seen], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_head_of_bf16_and_an_image_run(name: str) -> None:
    tensors = tuple(x.to(torch.bfloat16) for x in qkv(FLUX, heads=3, dim=40))
    plan = make_plan(name, FLUX, tensors, density=0.4)  # type: ignore[arg-type]
    out = run(plan, tensors)  # type: ignore[arg-type]
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", NAMES)
def test_two_plans_of_the_same_input_are_the_same(name: str) -> None:
    tensors = qkv(VIDEO, seed=3)
    first, second = (make_plan(name, VIDEO, tensors, density=0.3) for _ in range(2))
    for one, other in zip(_parts(first), _parts(second), strict=True):
        assert torch.equal(one.mask.bits, other.mask.bits)
    assert torch.equal(run(first, tensors), run(second, tensors))
