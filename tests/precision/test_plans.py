"""A plan with a precision: what it computes, how far from 16 bit that is, and with what it goes together."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from problems import HUNYUAN, VIDEO, make_plan, qkv, run
from torch import Tensor

from dit_accel.plan import Plan, execute, execute_with_lse
from dit_accel.precision.by_head import head_errors, with_precision
from dit_accel_kernels import block_stats, permute_tokens
from dit_accel_kernels.quantize import PRECISIONS
from dit_accel_kernels.quantized import quantized_block_sparse_attention
from dit_accel_kernels.types import Pooled

#: Relative L2 error of the output that these formats stay below on the problems of this folder.
ERRORS = {"int8": 0.02, "int8_fp8": 0.04, "fp8": 0.1, "int8_int8": 0.02, "int4": 0.25}


def _error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def _leaf(plan: Plan) -> Plan:
    assert plan.leaves == (plan,)
    return plan


@pytest.mark.parametrize("precision", ERRORS)
@pytest.mark.parametrize(
    "name", ["union", "adaspa"]
)  # an order a head and pooled blocks; natural order, dropped blocks
def test_it_is_the_operator_with_the_lists_order_and_remainder_of_the_plan(name: str, precision: str) -> None:
    q, k, v = tensors = qkv(HUNYUAN, heads=3, batch=2)
    plan = _leaf(make_plan(name, HUNYUAN, tensors, density=0.4, precision=precision))
    assert plan.precision == PRECISIONS[precision]
    if plan.key_order is not None:
        k, v = permute_tokens(k, plan.key_order), permute_tokens(v, plan.key_order)
    pooled = None
    if plan.compensate:
        block = plan.mask.block_k
        mean_k, _, count = block_stats(k, block=block)
        bias = count.float().log()[:, None]
        pooled = Pooled(mean_k, block_stats(v, block=block).mean, bias, plan.mask.bits)
    options = {"order": plan.order, "pooled": pooled, "backend": "reference"}
    want = quantized_block_sparse_attention(q, k, v, plan.mask.lists(), precision=precision, **options)
    got = run(plan, tensors)
    assert torch.equal(got, want)
    wide = run(make_plan(name, HUNYUAN, tensors, density=0.4), tensors)
    assert 1e-5 < _error(got, wide) < ERRORS[precision]


def test_keys_that_quantising_moves_are_those_that_were_moved_before() -> None:
    """Without a remainder, order and number format are one pass."""
    tensors = qkv(VIDEO, heads=3)
    changes = {"compensate": "drop", "density": 0.4, "precision": "int8_fp8"}
    plan = _leaf(make_plan("union", VIDEO, tensors, **changes))
    assert plan.key_order is not None
    q, k, v = tensors
    moved = q, permute_tokens(k, plan.key_order), permute_tokens(v, plan.key_order)
    got = run(plan, tensors)
    torch.testing.assert_close(got, run(dataclasses.replace(plan, key_order=None), moved), atol=0, rtol=0)


@pytest.mark.parametrize("precision", ["int8", "int8_fp8", "int8_int8"])
def test_correction_at_mean_queries(precision: str) -> None:
    """``auto``: pooled blocks in the same softmax and a 16-bit correction behind it."""
    tensors = qkv(HUNYUAN, heads=3)
    slots = {"compensate": "query_mean", "density": 0.3}
    wide = run(make_plan("auto", HUNYUAN, tensors, **slots), tensors)
    got = run(make_plan("auto", HUNYUAN, tensors, **slots, precision=precision), tensors)
    assert 1e-5 < _error(got, wide) < ERRORS[precision]
    plain = run(make_plan("auto", HUNYUAN, tensors, **{**slots, "compensate": "mean"}, precision=precision), tensors)
    assert _error(plain, wide) > 2 * _error(got, wide)  # the correction is there


@pytest.mark.parametrize("name", ["svg2", "pisa", "svg1", "residual", "agent", "rectified"])
def test_further_kinds_of_plans(name: str) -> None:
    """Orders by content in batch elements, patterns, and what corrects the output."""
    tensors = qkv(VIDEO, batch=2)
    changes: dict[str, object] = {} if name == "svg2" else {"density": 0.4}
    if name == "residual":  # the preset has token windows
        name, changes = "adaspa", {**changes, "compensate": "residual"}
    wide, narrow = (make_plan(name, VIDEO, tensors, **changes, precision=p) for p in ("bf16", "int8"))
    assert {leaf.precision for leaf in narrow.leaves} == {PRECISIONS["int8"]}
    torch.testing.assert_close(narrow.density, wide.density)
    assert narrow.pooled_density == wide.pooled_density
    got, want = run(narrow, tensors), run(wide, tensors)
    if changes.get("compensate") == "residual":
        # What was lacking includes what the format lost: at the planning step nothing is left of it.
        assert _error(got, want) < 1e-6
    else:
        assert 1e-5 < _error(got, want) < ERRORS["int8"]


def test_hidden_keys_stay_hidden() -> None:
    """A mask over visual keys: heads become batch elements, each with its own order of the mask."""
    tensors = qkv(VIDEO, heads=3, batch=2)
    valid = torch.ones(2, VIDEO.tokens, dtype=torch.bool)
    valid[0, 40:170], valid[1, 200:260] = False, False
    plan = make_plan("union", VIDEO, tensors, density=0.5, precision="int8_fp8")
    assert plan.order is not None
    assert len(set(plan.order.head.tolist())) > 1
    q, k, v = tensors
    out = run(plan, tensors, valid)
    other = v.masked_fill(~valid[:, None, :, None], 50.0)
    assert torch.equal(run(plan, (q, k, other), valid), out)
    wide = run(dataclasses.replace(plan, precision=None), tensors, valid)
    assert 1e-5 < _error(out, wide) < ERRORS["int8_fp8"]


def test_log_sum_exp_is_that_of_16_bit() -> None:
    tensors = qkv(HUNYUAN)
    options = {"scale": None, "key_valid": None, "backend": "reference"}
    plans = [make_plan("union", HUNYUAN, tensors, density=0.4, precision=p) for p in ("bf16", "int8")]
    (_, want), (_, got) = (execute_with_lse(plan, *tensors, **options) for plan in plans)
    assert got is not None
    torch.testing.assert_close(got, want, atol=0.1, rtol=0)


# -- groups of heads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["union", "auto", "sparge_topk", "svg2", "pisa"])
def test_heads_that_stay_are_16_bit_and_the_others_are_not(name: str) -> None:
    tensors = qkv(VIDEO, heads=4, batch=2)
    plan = make_plan(name, VIDEO, tensors, density=0.4)
    mixed = with_precision(plan, PRECISIONS["int8"], (1, 3), 4)
    narrow = with_precision(plan, PRECISIONS["int8"], (), 4)
    options = {"scale": None, "key_valid": None, "backend": "reference"}
    out, lse = execute_with_lse(mixed, *tensors, **options)
    want, want_lse = execute_with_lse(plan, *tensors, **options)
    low, low_lse = execute_with_lse(narrow, *tensors, **options)
    assert lse is not None
    assert want_lse is not None
    assert low_lse is not None
    torch.testing.assert_close(out[:, [1, 3]], want[:, [1, 3]], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out[:, [0, 2]], low[:, [0, 2]], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse[:, [1, 3]], want_lse[:, [1, 3]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse[:, [0, 2]], low_lse[:, [0, 2]], atol=1e-5, rtol=1e-5)
    assert (head_errors(low, want) > 1e-5).all()
    torch.testing.assert_close(mixed.density, plan.density)


def test_groups_under_a_mask_of_visual_keys() -> None:
    tensors = qkv(VIDEO, heads=4)
    valid = torch.ones(1, VIDEO.tokens, dtype=torch.bool)
    valid[:, 40:170] = False
    plan = make_plan("union", VIDEO, tensors, density=0.5)
    mixed = with_precision(plan, PRECISIONS["int8"], (2,), 4)
    errors = head_errors(run(mixed, tensors, valid), run(plan, tensors, valid))
    assert errors[2] < 1e-6
    assert (errors[[0, 1, 3]] > 1e-5).all()


def test_a_mask_that_heads_share_is_not_cut() -> None:
    tensors = qkv(VIDEO, heads=4)
    plan = make_plan("radial", VIDEO, tensors)
    assert plan.heads == 1
    mixed = with_precision(plan, PRECISIONS["int8"], (0,), 4)
    assert all(group.mask is plan.mask for _, group in mixed.groups)
    errors = head_errors(run(mixed, tensors), run(plan, tensors))
    assert errors[0] < 1e-6
    assert (errors[1:] > 1e-5).all()


@pytest.mark.parametrize(("wide", "narrow"), [((5,), True), ((0, 5), False)])
def test_where_heads_cannot_be_cut_the_layer_follows_the_many(wide: tuple[int, ...], narrow: bool) -> None:
    plan = make_plan("agent", VIDEO, qkv(VIDEO, heads=8), density=0.4)
    assert plan.state is not None
    found = with_precision(plan, PRECISIONS["int8"], wide, 8)
    assert not found.groups
    assert (found.precision is not None) == narrow


def test_windows_and_gathered_keys_are_refused() -> None:
    tensors = qkv(VIDEO)
    plan = dataclasses.replace(make_plan("na", VIDEO, tensors), precision=PRECISIONS["int8"])
    with pytest.raises(ValueError, match="token windows or gathered keys"):
        execute(plan, *tensors, scale=None, key_valid=None, backend="reference")
