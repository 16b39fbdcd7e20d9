"""What holds for every method that scores blocks."""

from __future__ import annotations

import pytest
import torch

from dit_accel.presets import get_method
from tests.methods._scored import FLUX, HUNYUAN, SMALL, inputs, masked_attention, natural, plan, run, token_mask

PRESETS = (
    "anchor", "asa", "bra", "dhsa", "draft", "jenga", "lite", "proxy", "sale", "sparge", "sparge_topk", "subblock",
    "vmoba", "xattn",
)  # fmt: skip
DENSITIES = (0.5, 0.3, 0.2, 0.1)


@pytest.mark.parametrize("geometry", [FLUX, HUNYUAN, SMALL], ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_plan_is_what_it_says(name: str, geometry: object) -> None:
    """No row is empty, text is exact, the density is that of the mask, and the output is dense attention under it."""
    q, k, v = inputs(geometry, batch=2)  # type: ignore[arg-type]
    made = plan(name, q, k, v, geometry)  # type: ignore[arg-type]
    assert bool(made.finite)
    seen = token_mask(made, k)
    assert seen.any(-1).all()
    work = made.density + made.gathered_density
    torch.testing.assert_close(work.expand(2, 3), seen.float().mean((2, 3)), atol=1e-6, rtol=1e-5)
    seen = natural(made, seen)
    extra = torch.ones(geometry.tokens, dtype=torch.bool)  # type: ignore[attr-defined]
    extra[geometry.visual_slice] = False  # type: ignore[attr-defined]
    assert seen[:, :, extra].all()
    assert seen[..., extra].all()
    torch.testing.assert_close(run(made, q, k, v), masked_attention(q, k, v, seen), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("geometry", [FLUX, HUNYUAN], ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_density_is_met(name: str, geometry: object) -> None:
    """Work comes near to the density asked for, as far as text and a block of each row leave it free."""
    q, k, v = inputs(geometry, seed=1)  # type: ignore[arg-type]
    base = get_method(name).replace(block_q=32, block_k=32)
    floor = plan(base.replace(density=1e-6), q, k, v, geometry)  # type: ignore[arg-type]
    least = float((floor.density + floor.gathered_density).mean())
    last = 2.0
    for density in DENSITIES:
        made = plan(base.replace(density=density), q, k, v, geometry)  # type: ignore[arg-type]
        work = float((made.density + made.gathered_density).mean())
        assert work <= last
        last = work
        # top-k rules keep text rows on top of a row's budget
        assert work <= max(density, least) + 0.08, (density, least)
        assert work >= min(density, 1.0) - 0.06, (density, least)


@pytest.mark.parametrize("name", PRESETS)
def test_density_one_is_dense(name: str) -> None:
    q, k, v = inputs(SMALL, seed=2, batch=2)
    made = plan(get_method(name).replace(density=1.0), q, k, v, SMALL)
    work = made.density + made.gathered_density
    torch.testing.assert_close(work, torch.ones_like(work))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(run(made, q, k, v), dense, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_padding_is_not_looked_at(name: str) -> None:
    """Invalid keys change neither the plan nor the output, whatever they hold."""
    q, k, v = inputs(HUNYUAN, seed=3, batch=2)
    valid = torch.ones(2, HUNYUAN.tokens, dtype=torch.bool)
    valid[0, -25:] = False
    poisoned = [x.clone() for x in (k, v)]
    for x in poisoned:
        x[0, :, -25:] = 1e4
    method = get_method(name).replace(density=0.3, block_q=32, block_k=32)
    clean = plan(method, q, k, v, HUNYUAN, key_valid=valid)
    made = plan(method, q, *poisoned, HUNYUAN, key_valid=valid)
    assert torch.equal(clean.mask.levels(), made.mask.levels())
    assert torch.equal(token_mask(clean, k), token_mask(made, k))
    out = run(made, q, *poisoned, key_valid=valid)
    seen = natural(made, token_mask(made, k))
    torch.testing.assert_close(out, masked_attention(q, *poisoned, seen, valid), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PRESETS)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in inputs(SMALL, seed=4))
    made = plan(get_method(name).replace(density=0.4), q, k, v, SMALL)
    assert bool(made.finite)
    out = run(made, q, k, v)
    seen = natural(made, token_mask(made, k))
    want = masked_attention(q.float(), k.float(), v.float(), seen)
    torch.testing.assert_close(out.float(), want, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("name", PRESETS)
def test_scores_that_are_not_finite_are_reported(name: str) -> None:
    q, k, v = inputs(SMALL, seed=5)
    q[0, 1, 20] = float("nan")
    made = plan(name, q, k, v, SMALL)
    assert not bool(made.finite)
    assert token_mask(made, k).any(-1).all()
