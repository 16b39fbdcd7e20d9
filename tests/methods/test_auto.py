"""The parts of ``auto`` against loops in float64, and what they are worth on inputs with structure."""

from __future__ import annotations

import math

import pytest
import torch
from _scored import FLUX, HUNYUAN, SMALL, context, inputs
from driving import make_run, one_step
from torch import Tensor

from dit_accel.adapter import StepInfo
from dit_accel.choice._registry import sampled_rows
from dit_accel.choice.spread import order_error
from dit_accel.compensate import WorkSizes, make_compensation
from dit_accel.geometry import TokenGeometry
from dit_accel.plan import execute
from dit_accel.planner import Planner
from dit_accel.policy import Action, Policy
from dit_accel.presets import get_method
from dit_accel.score import block_scores


def exact_output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def smooth(geometry: TokenGeometry) -> tuple[Tensor, Tensor, Tensor]:
    """Three heads of queries, keys and values that change slowly over the grid, as those of trained models do."""
    torch.manual_seed(1)
    axes = torch.meshgrid(*(torch.linspace(0, 1, n) for n in geometry.axes), indexing="ij")
    where = torch.stack([a.reshape(-1) for a in axes], -1)
    made = []
    for size in (1.5, 1.5, 1.0):
        waves, offsets = 2 * torch.randn(3, 3, 32), torch.randn(3, 1, 32) * 3
        field = torch.zeros(1, 3, geometry.tokens, 32)
        field[:, :, geometry.visual_slice] = torch.cos(where @ waves + offsets)
        made.append(size * field + 0.02 * torch.randn_like(field))
    return made[0], made[1], made[2]


def expected_spread(q: Tensor, k: Tensor, v: Tensor, block_q: int, block_k: int, scale: float) -> Tensor:
    """The formula of ``score='spread'`` for one head, written block by block."""
    rows, cols, values = q.double().split(block_q), k.double().split(block_k), v.double().split(block_k)
    found = torch.zeros(len(rows), len(cols), dtype=torch.float64)
    for i, a in enumerate(rows):
        weights = torch.tensor([len(b) * math.exp(scale * float(a.mean(0) @ b.mean(0))) for b in cols])
        mass = weights.double() / weights.sum()
        output = sum(float(m) * c.mean(0) for m, c in zip(mass, values, strict=True))
        for j, (b, c) in enumerate(zip(cols, values, strict=True)):
            joint = float((a.var(0, unbiased=False) * b.var(0, unbiased=False)).sum())
            distance = float((c - output).square().sum(1).mean())
            found[i, j] = float(mass[j]) * scale * math.sqrt(joint) * math.sqrt(distance)
    return found


@pytest.mark.parametrize("geometry", [SMALL, FLUX])
def test_spread_is_the_formula(geometry: TokenGeometry) -> None:
    q, k, v = inputs(geometry, seed=3)
    method = get_method("auto").replace(order=("hwf",), order_choice="fixed", block_q=32, block_k=64)
    ctx = context(method, q, k, v, geometry)
    found = block_scores(ctx).values
    table = torch.arange(geometry.tokens) if ctx.order is None else ctx.order.table[0].long()
    for head in range(q.shape[1]):
        expected = expected_spread(*(x[0, head, table] for x in (q, k, v)), 32, 64, q.shape[-1] ** -0.5)
        torch.testing.assert_close(found[0, head].double(), expected, rtol=2e-3, atol=1e-6)


def test_spread_takes_no_notice_of_padding() -> None:
    q, k, v = inputs(HUNYUAN, seed=4)
    method = get_method("auto").replace(order=("raster",), order_choice="fixed")
    valid = torch.ones(1, HUNYUAN.tokens, dtype=torch.bool)
    valid[:, -30:] = False
    first = block_scores(context(method, q, k, v, HUNYUAN, key_valid=valid)).values
    k[:, :, -30:], v[:, :, -30:] = float("nan"), float("nan")
    second = block_scores(context(method, q, k, v, HUNYUAN, key_valid=valid)).values
    assert torch.equal(first, second)
    assert torch.isfinite(first).all()


def test_each_head_takes_the_order_that_leaves_least() -> None:
    """Two heads see along different axes: tokens that share a column, and tokens that share a frame."""
    geometry = TokenGeometry((8, 8, 16))
    torch.manual_seed(0)
    frame, height, width = (
        x.reshape(-1) for x in torch.meshgrid(*(torch.arange(n) for n in (8, 8, 16)), indexing="ij")
    )
    column = torch.nn.functional.one_hot(height * 16 + width, 128).float()
    row = torch.nn.functional.one_hot(frame * 8 + height, 64).float()
    code = torch.stack([column, torch.nn.functional.pad(row, (0, 64))])[None] * 5
    noise = torch.randn(1, 2, 1024, 128) * 0.1
    q, k, v = code + noise, code + noise.flip(-1), torch.randn(1, 2, 1024, 128)
    method = get_method("auto").replace(order=("fhw", "hwf"), block_q=16, block_k=16)
    planner = Planner(method)
    ctx = planner.context(q, k, v, None, geometry, density=0.2, scale=1.0)
    table = planner.layout(geometry, q.device).table
    assert table is not None
    left = order_error(ctx, table)
    plan = planner.plan(ctx)
    assert plan.order is not None
    assert plan.order_names == ("fhw", "hwf")
    assert plan.order.head.tolist() == [1, 0]
    assert left.argmin(0).tolist() == [1, 0]


@pytest.mark.parametrize("blocks", [1, 5, 17, 64, 100, 333, 1182])
def test_rows_are_sampled_in_the_middle_of_their_parts(blocks: int) -> None:
    rows = sampled_rows(blocks, torch.device("cpu"))
    assert rows.dtype == torch.int32
    assert rows.tolist() == [math.floor((i + 0.5) * blocks / len(rows)) for i in range(len(rows))]
    assert len(set(rows.tolist())) == len(rows)


def test_the_correction_takes_away_much_of_the_error() -> None:
    q, k, v = smooth(HUNYUAN)
    exact = exact_output(q, k, v)
    errors = {}
    for compensate in ("drop", "mean", "query_mean"):
        method = get_method("auto").replace(compensate=compensate)
        ctx = context(method, q, k, v, HUNYUAN, density=0.2)
        plan = Planner(method).plan(ctx)
        out = execute(plan, q, k, v, scale=None, key_valid=None, backend=None)
        errors[compensate] = float((out - exact).norm() / exact.norm())
    assert errors["query_mean"] < 0.8 * errors["mean"] < 0.8 * errors["drop"]


def test_several_mean_queries_a_block() -> None:
    """A mean over one query is that query: the correction then gives dense attention. Means over fewer are no worse."""
    q, k, v = smooth(HUNYUAN)
    exact = exact_output(q, k, v)
    outputs = {}
    for queries in (1, 16, 32, 64, None):
        spec = "query_mean" if queries is None else f"query_mean:{queries}"
        method = get_method("auto").replace(compensate=spec, block_q=64)
        plan = Planner(method).plan(context(method, q, k, v, HUNYUAN, density=0.2))
        outputs[queries] = execute(plan, q, k, v, scale=None, key_valid=None, backend=None)
    torch.testing.assert_close(outputs[1], exact, atol=2e-5, rtol=2e-4)
    torch.testing.assert_close(outputs[64], outputs[None], atol=0, rtol=0)
    errors = [float((outputs[n] - exact).norm()) for n in (1, 16, 32, 64)]
    assert errors == sorted(errors)


def test_the_mean_queries_count_as_work() -> None:
    assert make_compensation("query_mean").known_work(WorkSizes(128, 64, 4096, 64)) == 1 / 128
    assert make_compensation("query_mean:32").known_work(WorkSizes(128, 64, 4096, 64)) == 1 / 32
    assert make_compensation("query_mean:256").known_work(WorkSizes(128, 64, 4096, 64)) == 1 / 128


@pytest.mark.parametrize("spec", ["query_mean:48", "query_mean:0", "query_mean:-2", "query_mean:0.5"])
def test_bad_mean_queries(spec: str) -> None:
    with pytest.raises(ValueError, match="queries must be a power of two"):
        get_method("auto").replace(compensate=spec)


@pytest.mark.parametrize("select", ["top_k", "top_k_head", "top_k_layer"])
@pytest.mark.parametrize("geometry", [FLUX, HUNYUAN], ids=["picture", "video"])
def test_run_density_counts_the_rows_of_the_text(select: str, geometry: TokenGeometry) -> None:
    """Their rows are whole, which the other rows have to make up for."""
    run = make_run("auto", 1, run_density=0.4, select=select, block_q=32, block_k=32, warmup=0.0, pictures=())
    tensors = [x.transpose(1, 2) for x in inputs(geometry, seed=3)]
    for step in range(6):
        one_step(run, step, 6, geometry=geometry, tensors=lambda *_: (tensors[0], tensors[1], tensors[2]))
    assert run.status().density == pytest.approx(0.4, abs=0.02)


def test_pictures_have_bricks_among_their_orders() -> None:
    method = get_method("auto")
    assert Planner(method).layout(FLUX, torch.device("cpu")).names == ("fhw", "fwh", "brick2d")
    assert Planner(method).layout(HUNYUAN, torch.device("cpu")).names == ("fhw", "fwh", "hwf", "hfw", "whf", "wfh")


def test_everything_kept_is_dense_attention() -> None:
    q, k, v = inputs(SMALL, seed=6)
    method = get_method("auto")
    plan = Planner(method).plan(context(method, q, k, v, SMALL, density=1.0))
    out = execute(plan, q, k, v, scale=None, key_valid=None, backend=None)
    torch.testing.assert_close(out, exact_output(q, k, v), atol=2e-5, rtol=1e-4)


def test_padding_and_orders_by_head_go_together() -> None:
    """Masks fold heads into the batch; the correction must follow."""
    geometry = TokenGeometry((6, 12, 20))
    q, k, v = inputs(geometry, seed=7, batch=2)
    valid = torch.ones(2, geometry.tokens, dtype=torch.bool)
    valid[1, 700:900] = False
    method = get_method("auto")
    planner = Planner(method)
    ctx = planner.context(q, k, v, None, geometry, density=0.3, scale=None, key_valid=valid)
    plan = planner.plan(ctx)
    hidden = k.masked_fill(~valid[:, None, :, None], 50.0)
    out = execute(plan, q, hidden, v, scale=None, key_valid=valid, backend=None)
    again = execute(plan, q, k, v, scale=None, key_valid=valid, backend=None)
    assert torch.equal(out, again)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None])
    assert float((out - exact).norm() / exact.norm()) < 0.5


def test_auto_needs_no_dense_step() -> None:
    method = get_method("auto")
    assert not method.needs_lse
    assert method.replace(warmup=0.0).plan_costs(TokenGeometry((21, 30, 52)), 6)[0] < 0.01


@pytest.mark.parametrize("steps", [4, 8, 30, 50])
def test_a_falling_density_keeps_the_mean_that_was_asked_for(steps: int) -> None:
    policy = Policy(get_method("auto"))
    densities: list[float] = []
    planned_at: int | None = None
    for i in range(steps):
        step = StepInfo(step=i, steps=steps)
        action = policy.action(step, planned_at is not None, planned_at)
        if action is Action.PLAN:
            planned_at, current = i, policy.share_of(0.2, step)
        if action in (Action.PLAN, Action.SPARSE):
            densities.append(current)
    assert sum(densities) / len(densities) == pytest.approx(0.2)
    assert densities == sorted(densities, reverse=True)
    assert densities[0] > 1.5 * densities[-1]


def test_what_a_plan_cannot_use_is_not_given_to_others() -> None:
    policy = Policy(get_method("auto"))
    first = StepInfo(step=3, steps=30)
    assert policy.share_of(0.9, first) == 1.0
    assert Policy(get_method("auto").replace(density=0.3)).share_of(0.9, first) == 0.9
