"""What ``auto`` has for pictures: first order around mean queries, mass of fine means, nested bricks, kept residuals."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from _scored import FLUX, HUNYUAN, SMALL, context, inputs
from driving import make_run, one_step
from test_auto import exact_output, smooth
from torch import Tensor

from dit_accel.adapter import StepInfo
from dit_accel.compensate import WorkSizes, make_compensation
from dit_accel.compensate.residual import without_residual
from dit_accel.geometry import TokenGeometry
from dit_accel.method import Method
from dit_accel.order import token_order
from dit_accel.plan import Plan, execute
from dit_accel.planner import Planner
from dit_accel.presets import get_method
from dit_accel.score import block_scores
from dit_accel_kernels import permute_tokens
from dit_accel_kernels.lists import unpack_bits


def first_order_of(plan: Plan, q: Tensor, k: Tensor, v: Tensor, head: int, scale: float) -> Tensor:
    """Output of one head ``[S, D]`` in block order, query by query in float64, from the formulas of the docstring."""
    q, k, v = (
        permute_tokens(x, plan.order)[0, head].double() if plan.order else x[0, head].double() for x in (q, k, v)
    )
    block_q, block_k = plan.mask.block_q, plan.mask.block_k
    keys, values = k.split(block_k), v.split(block_k)
    kept = unpack_bits(plan.mask.bits, len(keys))[0, min(head, plan.mask.bits.shape[1] - 1)].bool()
    covariance = [(b - b.mean(0)).mT @ c / len(b) for b, c in zip(keys, values, strict=True)]
    out, lse = torch.empty_like(q), torch.empty(len(q), dtype=torch.float64)

    def sparse(x: Tensor, row: int) -> tuple[Tensor, Tensor]:
        logits, what = [], []
        for j, (b, c) in enumerate(zip(keys, values, strict=True)):
            whole = bool(kept[row, j])
            logits.append(scale * (b if whole else b.mean(0, keepdim=True)) @ x + (0 if whole else math.log(len(b))))
            what.append(c if whole else c.mean(0, keepdim=True))
        found = torch.cat(logits)
        return found.softmax(0) @ torch.cat(what), found.logsumexp(0)

    for s in range(len(q)):
        out[s], lse[s] = sparse(q[s], s // block_q)
    for i, rows in enumerate(torch.arange(len(q)).split(block_q)):
        mean, middle = q[rows].mean(0), lse[rows].mean()
        lacks = (scale * k @ mean).softmax(0) @ v - sparse(mean, i)[0]
        skipped = [j for j in range(len(keys)) if not kept[i, j]]
        if not skipped:
            continue
        weights = torch.stack([scale * keys[j].mean(0) @ mean + math.log(len(keys[j])) for j in skipped])
        matrix = scale * sum((w - middle).exp() * covariance[j] for w, j in zip(weights, skipped, strict=True))
        centre = sum(p * keys[j].mean(0) for p, j in zip(weights.softmax(0), skipped, strict=True))
        for s in rows:
            apart = q[s] - mean
            share = (middle - lse[s] + scale * apart @ centre).clamp(max=0).exp()
            out[s] += share * (lacks + apart @ matrix)
    return out


@pytest.mark.parametrize("geometry", [SMALL, FLUX])
@pytest.mark.parametrize("blocks", [(32, 16), (16, 32)])
def test_first_order_is_the_formula(geometry: TokenGeometry, blocks: tuple[int, int]) -> None:
    q, k, v = inputs(geometry, seed=4)
    sizes = {"block_q": blocks[0], "block_k": blocks[1]}
    method = get_method("auto").replace(compensate="first_order", order=("hwf",), order_choice="fixed", **sizes)
    plan = Planner(method).plan(context(method, q, k, v, geometry, density=0.3))
    out = execute(plan, q, k, v, scale=0.4, key_valid=None, backend=None)
    moved = out if plan.order is None else permute_tokens(out, plan.order)
    for head in range(q.shape[1]):
        expected = first_order_of(plan, q, k, v, head, 0.4)
        torch.testing.assert_close(moved[0, head].double(), expected, atol=2e-5, rtol=1e-4)


def test_first_order_takes_away_what_query_means_leave() -> None:
    q, k, v = smooth(HUNYUAN)
    exact = exact_output(q, k, v)
    errors = {}
    for compensate in ("mean", "query_mean:32", "first_order:32"):
        method = get_method("auto").replace(compensate=compensate)
        plan = Planner(method).plan(context(method, q, k, v, HUNYUAN, density=0.2))
        out = execute(plan, q, k, v, scale=None, key_valid=None, backend=None)
        errors[compensate] = float((out - exact).norm() / exact.norm())
    assert errors["first_order:32"] < 0.6 * errors["query_mean:32"] < 0.6 * errors["mean"]


def test_first_order_with_everything_kept_is_dense_attention() -> None:
    q, k, v = inputs(SMALL, seed=6)
    method = get_method("auto").replace(compensate="first_order:64")
    plan = Planner(method).plan(context(method, q, k, v, SMALL, density=1.0))
    out = execute(plan, q, k, v, scale=None, key_valid=None, backend=None)
    torch.testing.assert_close(out, exact_output(q, k, v), atol=2e-5, rtol=1e-4)


def test_first_order_under_a_mask_of_keys() -> None:
    """Hidden keys count nothing, whatever they hold, also where heads are folded into the batch."""
    geometry = TokenGeometry((6, 12, 20))
    q, k, v = inputs(geometry, seed=7, batch=2)
    valid = torch.ones(2, geometry.tokens, dtype=torch.bool)
    valid[1, 700:900] = False
    method = get_method("auto").replace(compensate="first_order:32")
    planner = Planner(method)
    plan = planner.plan(planner.context(q, k, v, None, geometry, density=0.3, scale=None, key_valid=valid))
    hidden_k, hidden_v = (x.masked_fill(~valid[:, None, :, None], 50.0) for x in (k, v))
    again = execute(plan, q, k, v, scale=None, key_valid=valid, backend=None)
    out = execute(plan, q, hidden_k, hidden_v, scale=None, key_valid=valid, backend=None)
    torch.testing.assert_close(out, again, atol=0, rtol=0)


def test_a_query_that_is_not_finite_spoils_itself_alone() -> None:
    q, k, v = inputs(SMALL, seed=8)
    method = get_method("auto").replace(compensate="first_order:32")
    plan = Planner(method).plan(context(method, q, k, v, SMALL, density=0.3))
    q[0, 0, 5] = torch.nan
    out = execute(plan, q, k, v, scale=None, key_valid=None, backend=None)
    spoilt = ~torch.isfinite(out).all(-1)
    assert spoilt[0, 0, 5]
    assert int(spoilt.sum()) == 1


def test_the_first_order_counts_as_work() -> None:
    sizes = WorkSizes(block_q=128, block_k=64, tokens=4096, dim=64)
    expected = 1 / 64 + 0.5 * 64 / (64 * 64) + 64 / 4096
    assert make_compensation("first_order:64").known_work(sizes) == pytest.approx(expected)


@pytest.mark.parametrize("geometry", [SMALL, FLUX])
def test_fine_spread_with_single_tokens_is_exact_mass(geometry: TokenGeometry) -> None:
    q, k, v = inputs(geometry, seed=3)
    method = get_method("auto").replace(
        score="fine_spread:1", order=("hwf",), order_choice="fixed", block_q=32, block_k=64
    )
    planner = Planner(method)
    order = planner.layout(geometry, q.device).order(torch.zeros(q.shape[1]))
    ctx = planner.context(q, k, v, None, geometry, density=0.3, scale=0.3, order=order)
    found = block_scores(ctx).values
    for head in range(q.shape[1]):
        x, y, z = (part[0, head].double() for part in (ctx.queries, ctx.keys, ctx.values))
        weights = (0.3 * x @ y.mT).softmax(-1)
        for i, rows in enumerate(torch.arange(len(x)).split(32)):
            mass = torch.stack([weights[rows][:, cols].sum(1).mean() for cols in torch.arange(len(y)).split(64)])
            output = sum(m * c.mean(0) for m, c in zip(mass, z.split(64), strict=True))
            for j, cols in enumerate(torch.arange(len(y)).split(64)):
                joint = (x[rows].var(0, unbiased=False) * y[cols].var(0, unbiased=False)).sum().sqrt()
                expected = mass[j] * 0.3 * joint * (z[cols] - output).square().sum(1).mean().sqrt()
                if not bool(ctx.forced.cols[j]):
                    assert float(found[0, head, i, j]) == pytest.approx(float(expected), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("tokens", [0, 3, 128])
def test_fine_means_must_divide_the_blocks(tokens: int) -> None:
    q, k, v = inputs(SMALL, seed=3)
    method = get_method("auto").replace(score=f"fine_spread:{tokens}")
    with pytest.raises(ValueError, match="needs tokens that divide blocks of 64 x 64"):
        block_scores(context(method, q, k, v, SMALL, density=0.3))


def test_bricks_of_pictures_are_nested() -> None:
    """Blocks of 64, 32 and 16 tokens are 8 x 8, 4 x 8 and 4 x 4 neighbours."""
    order = token_order(("brick2d",), torch.zeros(1, dtype=torch.int32), TokenGeometry((1, 24, 40)))
    assert order is not None
    places = order.table[0].long()
    for tokens, (high, wide) in {64: (8, 8), 32: (4, 8), 16: (4, 4)}.items():
        for block in places.split(tokens):
            rows, columns = block // 40, block % 40
            assert int(rows.max() - rows.min()) == high - 1
            assert int(columns.max() - columns.min()) == wide - 1


def test_a_picture_has_fields_of_its_own() -> None:
    method = Method(name="tried", score="mean_pool", density=0.5, pictures={"density": [0.4, 0.2], "warmup": 0.0})  # type: ignore[arg-type]
    assert method.pictures == (("density", (0.4, 0.2)), ("warmup", 0.0))
    assert method.fitting(TokenGeometry((1, 8, 8))).density == (0.4, 0.2)
    assert method.fitting(TokenGeometry((2, 8, 8))) is method
    assert Method.from_json(method.to_json()) == method
    assert method.replace(density=0.3).pictures == (("warmup", 0.0),)
    with pytest.raises(ValueError, match="pictures must be values of some of"):
        method.replace(pictures={"name": "other"})
    with pytest.raises(ValueError, match="warmup must be between 0 and 1"):
        method.replace(pictures={"warmup": 2.0})


def test_a_run_takes_the_fields_of_the_sequence_at_hand() -> None:
    run = make_run(Method(name="tried", score="mean_pool", density=0.5, pictures=(("block_q", 32),)), 1, warmup=0.0)
    video, picture = TokenGeometry((4, 8, 8)), TokenGeometry((1, 16, 16))
    for geometry, block in ((video, 64), (picture, 32), (video, 64)):
        tensors = [x.transpose(1, 2) for x in inputs(geometry, seed=3)]
        for step in range(2):
            one_step(run, step, 2, geometry=geometry, tensors=lambda *_, t=tensors: tuple(t))
        assert run.method.block_q == block
        assert run.status().sparse_calls > 0


def test_a_kept_residual_on_top_of_means_is_exact_while_nothing_changes() -> None:
    """The plan's step is dense; on the same tensors the sparse output and what it lacked are dense attention again."""
    method = get_method("auto").replace(compensate="residual:query_mean,32", branches="separate", pictures=())
    run = make_run(method, 1, density=0.2, refresh=())
    tensors = [x.transpose(1, 2) for x in inputs(FLUX, seed=3)]
    exact = exact_output(*(x.transpose(1, 2) for x in tensors)).transpose(1, 2)
    for step in range(3):
        (out,) = one_step(run, step, 10, geometry=FLUX, tensors=lambda *_: tuple(tensors)).values()
        torch.testing.assert_close(out, exact, atol=2e-5, rtol=1e-4)
    assert run.status().sparse_calls == 2


def test_residuals_are_kept_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    method = get_method("auto").replace(compensate="residual:query_mean,32", branches="separate", pictures=())
    tensors = [x.transpose(1, 2) for x in inputs(FLUX, seed=3)]
    monkeypatch.setattr("dit_accel.compensate.residual.RESIDUAL_BYTES", 2 * tensors[0].nbytes)
    run = make_run(method, 3, density=0.2, refresh=())
    for step in range(2):
        one_step(run, step, 10, geometry=FLUX, tensors=lambda *_: tuple(tensors))
    assert [state.plan.state is not None for state in run._states.values()] == [True, True, False]
    assert "residuals of more than 0 MiB in all are not kept" in run.status().notes
    run.reset()
    gc.collect()
    for step in range(2):  # those of the run before are gone
        one_step(run, step, 10, geometry=FLUX, tensors=lambda *_: tuple(tensors))
    assert sum(state.plan.state is not None for state in run._states.values()) == 2


def test_the_base_of_a_residual_must_keep_nothing() -> None:
    with pytest.raises(ValueError, match="the base of a residual must keep nothing in the plan"):
        make_compensation("residual:rectified")
    assert make_compensation("residual:query_mean,32").known_work(WorkSizes(64, 64, 4096, 64)) == 1 / 32


@pytest.mark.parametrize(
    ("asked", "dense", "remainder"), [(0.5, 5, "residual:first_order,64"), (0.3, 0, "first_order:64")]
)
def test_auto_keeps_to_the_work_that_was_asked_for_on_pictures(asked: float, dense: int, remainder: str) -> None:
    """Dense steps lie where the work allows them; where it allows few, nothing is kept."""
    geometry = TokenGeometry((1, 40, 48), 0, 33)
    tensors = [x.transpose(1, 2) for x in inputs(geometry, seed=3)]
    run = make_run("auto", 1, run_density=asked)
    for step in range(20):
        one_step(run, step, 20, geometry=geometry, tensors=lambda *_: (tensors[0], tensors[1], tensors[2]))
    status = run.status()
    assert status.density == pytest.approx(asked, abs=0.02)
    assert run.method.compensate == remainder
    assert status.sparse_calls == 20 - dense


def test_auto_falls_back_where_a_picture_leaves_no_room() -> None:
    """The remainder alone costs more than was asked for; that of the form for video does not."""
    geometry = TokenGeometry((1, 40, 48), 0, 33)
    run = make_run("auto", 1, run_density=0.1, warmup=0.0)
    run.begin_forward(geometry, StepInfo(step=0, steps=20))
    assert run.method.compensate == "query_mean:64"


@pytest.mark.parametrize(
    ("spec", "base"), [("residual:first_order,64", "first_order:64"), ("residual", "drop"), ("mean", "mean")]
)
def test_the_base_of_a_residual_is_a_spec(spec: str, base: str) -> None:
    assert without_residual(spec) == base


def test_runs_of_few_steps_keep_nothing() -> None:
    """With eight steps four dense ones would be half of the run."""
    for steps, remainder in ((8, "first_order:64"), (28, "residual:first_order,64")):
        run = make_run("auto", 1)
        run.begin_forward(TokenGeometry((1, 40, 48), 0, 33), StepInfo(step=0, steps=steps))
        assert run.method.compensate == remainder
