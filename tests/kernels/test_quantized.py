"""8-bit attention: against float64 attention within what the formats lose, and kernels against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel_kernels import block_sparse_attention, lists_from_levels, permute_tokens
from dit_accel_kernels.backends import Backend
from dit_accel_kernels.block_sparse.configs import TileConfig
from dit_accel_kernels.quantize import PRECISIONS, Precision, quantize_qkv
from dit_accel_kernels.quantized import backends, quantized_block_sparse_attention
from dit_accel_kernels.quantized.reference import quantized_reference
from dit_accel_kernels.quantized.self_tests import TOLERANCE
from tests.kernels.problems import Case, Problem, make, oracle

TRITON = [
    pytest.param(("triton", "cpu"), id="interpreter", marks=pytest.mark.interpreter),
    pytest.param(("triton", "cuda"), id="gpu", marks=pytest.mark.gpu),
]
RUNNERS = [pytest.param(("reference", "cpu"), id="reference"), *TRITON]
# Largest relative error (2-norm) on normal random inputs, about 1.5 times what the reference shows.
LOSS = {"int8": 0.02, "int8_fp8": 0.045, "fp8": 0.065, "int8_int8": 0.025, "int4": 0.27, "int4_fp8": 0.28}
KERNELS = ["int8", "int8_fp8", "fp8", "int8_int8", "int4_fp8"]

CASES = [
    Case("d64", sq=128, sk=128, dtype=torch.bfloat16),
    Case("ragged", sq=131, sk=131, density=0.7, dtype=torch.float16),
    Case("more-keys", sq=70, sk=200, block_q=64, block_k=128, dtype=torch.bfloat16, pooled=True),
    Case("d72-batch-2", dim=72, batch=2, list_shape=(2, 1), order=True, pooled=True, dtype=torch.bfloat16),
    Case("valid", valid=True, batch=2, order=True, pooled=True, dim=128, dtype=torch.bfloat16, heads=2),
]
GPU_CASES = [
    Case("1000", sq=1000, sk=1000, heads=3, list_shape=(1, 3), density=0.3, block_q=128, block_k=128),
    Case("4097", sq=4097, sk=1111, dim=128, density=0.3, block_q=128, block_k=64, pooled=True, order=True),
    Case("half", sq=2048, sk=2048, dim=128, density=0.5, block_q=64, block_k=64, batch=2, order=True),
    Case("d256", sq=500, sk=700, dim=256, density=0.5, pooled=True, valid=True),
]


def problem(case: Case, device: str) -> Problem:
    """With keys whose mean smoothing must take off and give back."""
    p = make(case, device)
    p.k = p.k + 1.5
    if p.pooled is not None:
        p.pooled = replace(p.pooled, k=p.pooled.k + 1.5)
    return p


def extras(p: Problem) -> dict[str, Any]:
    return {"order": p.order, "pooled": p.pooled, "key_valid": p.key_valid}


def agree(p: Problem, precision: str | Precision, config: TileConfig | None = None) -> None:
    """The Triton kernel and the reference on the same codes; no self-test, which compiles four more kernels."""
    from dit_accel_kernels.quantized.launch import quantized_triton

    made = quantize_qkv(
        p.q, p.k, p.v, precision, block_k=p.lists.block_k, order=p.order, key_valid=p.key_valid, backend="reference"
    )
    options: dict[str, Any] = {**extras(p), "scale": p.q.shape[-1] ** -0.5}
    out, lse = quantized_triton(p.q, made, p.lists, config=config, **options)
    want, want_lse = quantized_reference(p.q, made, p.lists, **options)
    pv = made.precision.pv
    torch.testing.assert_close(out.float(), want.float(), rtol=0, atol=TOLERANCE[pv])
    error = (out.float() - want.float()).norm() / want.float().norm().clamp(min=1e-9)
    assert error < {"bf16": 6e-3, "fp8": 4e-2, "int8": 3e-2}[pv]
    assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
    atol = 6e-2 if pv == "int8" else 1e-3  # INT8 weights that round to 0 are missing in the sum, too
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=atol)
    assert out.stride() == p.q.stride()
    assert out.dtype == p.q.dtype


@pytest.mark.parametrize("name", LOSS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loses_what_the_format_loses(case: Case, name: str) -> None:
    p = problem(case, "cpu")
    out, lse = quantized_block_sparse_attention(
        p.q, p.k, p.v, p.lists, precision=name, return_lse=True, backend="reference", **extras(p)
    )
    want, want_lse = oracle(p)
    assert (out.double() - want).norm() / want.norm() < LOSS[name]
    assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
    seen = want_lse > -torch.inf
    assert (lse - want_lse)[seen].abs().max() < (0.5 if "int4" in name else 0.1)


def test_rotation_and_smoothing_help_where_channels_stand_out() -> None:
    p = problem(Case("outliers", dtype=torch.float32, density=1.0), "cpu")
    p.k[..., 3] *= 6
    p.k[..., 7] += 30
    want, _ = oracle(p)
    error = {}
    for smooth in (False, True):
        for rotate in (False, True):
            out = quantized_block_sparse_attention(
                p.q, p.k, p.v, p.lists, precision=Precision("int4", "bf16", smooth, rotate), backend="reference"
            )
            error[smooth, rotate] = float((out.double() - want).norm() / want.norm())
    assert error[True, False] < 0.8 * error[False, False]
    assert error[True, True] < 0.7 * error[True, False]


@pytest.mark.parametrize("runner", TRITON)
@pytest.mark.parametrize(
    ("case", "name"),
    [*zip(CASES, KERNELS), (CASES[1], "int8_int8"), (CASES[3], "int8_fp8")],
    ids=str,
)
def test_kernel_is_the_reference(case: Case, name: str, runner: tuple[str, str]) -> None:
    agree(problem(case, runner[1]), name)


@pytest.mark.parametrize("device", [pytest.param(x.values[0][1], id=x.id, marks=x.marks) for x in TRITON])
@pytest.mark.parametrize("name", ["int8", "int8_fp8"])
@pytest.mark.parametrize("config", [TileConfig(64, 64, 4, 2), TileConfig(64, 128, 4, 2, tma=True)], ids=str)
def test_tiles_smaller_than_blocks(name: str, config: TileConfig, device: str) -> None:
    if config.tma and device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs tensor descriptors")
    case = Case("tiles", sq=131, sk=150, block_q=128, block_k=128, pooled=True, dtype=torch.bfloat16, heads=1)
    p = problem(replace(case, list_shape=(1, 1), density=0.7), device)
    agree(p, name, config)


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS[:4])
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_kernel_is_the_reference_at_size(case: Case, name: str) -> None:
    agree(problem(replace(case, dtype=torch.bfloat16), "cuda"), name)


@pytest.mark.gpu
def test_rotated_and_rough_keys_on_a_gpu() -> None:
    p = problem(Case("rough", sq=700, sk=700, dim=128, dtype=torch.bfloat16), "cuda")
    agree(p, Precision("int8", "fp8", smooth_k=False, rotate=True))


@pytest.mark.parametrize("runner", RUNNERS)
def test_full_mask_is_dense_attention_and_empty_rows_are_zero(runner: tuple[str, str]) -> None:
    backend, device = runner
    p = problem(Case("full", sq=128, sk=128, dtype=torch.bfloat16, heads=1, list_shape=(1, 1)), device)
    lists = lists_from_levels(torch.tensor([[1, 1], [0, 0]], dtype=torch.uint8, device=device)[None, None], 64, 64)
    out, lse = quantized_block_sparse_attention(
        p.q, p.k, p.v, lists, precision="int8", return_lse=True, backend=backend
    )
    q, k, v = (x.double() for x in (p.q, p.k, p.v))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)[:, :, :64]
    assert (out[:, :, :64].double() - want).norm() / want.norm() < LOSS["int8"]
    assert not out[:, :, 64:].any()
    assert (lse[:, :, 64:] == -torch.inf).all()


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", ["int8", "int8_fp8"])
def test_skipped_blocks_are_never_read(name: str, runner: tuple[str, str]) -> None:
    backend, device = runner
    p = problem(Case("skip", sq=128, sk=171, dtype=torch.bfloat16, heads=1, list_shape=(1, 1)), device)
    levels = torch.tensor([[1, 0, 0], [1, 0, 1]], dtype=torch.uint8, device=device)[None, None]
    lists = lists_from_levels(levels, 64, 64)
    precision = replace(PRECISIONS[name], smooth_k=False)  # a mean is read of all keys, finite or not
    want = quantized_block_sparse_attention(p.q, p.k, p.v, lists, precision=precision, backend=backend)
    poisoned = quantize_qkv(p.q, p.k, p.v, precision, block_k=64, backend="reference")
    poisoned.k_scale[:, :, 1] = float("nan")
    values = poisoned.v if name == "int8_fp8" else p.v.clone()
    if name == "int8":
        values[:, :, 64:128] = float("nan")
    else:
        values.view(torch.uint8)[..., 64:128] = 127  # NaN
    poisoned = replace(poisoned, v=values)
    got = quantized_block_sparse_attention(
        p.q, p.k, p.v, lists, precision=precision, prepared=poisoned, backend=backend
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["int8", "fp8", "int8_int8"])
def test_one_bad_token_spreads_no_further_than_in_dense_attention(name: str) -> None:
    p = problem(Case("bad", sq=128, sk=128, dtype=torch.bfloat16, density=1.0), "cpu")
    lists = lists_from_levels(torch.eye(2, dtype=torch.uint8)[None, None], 64, 64)
    precision = replace(PRECISIONS[name], pv="int8" if name == "int8" else PRECISIONS[name].pv)
    options: dict[str, Any] = {"precision": precision, "backend": "reference"}
    p.q[:, :, 70, 0] = float("nan")
    p.k[:, :, 5, 3] = float("inf")
    p.v[:, :, 9, 3] = float("nan")
    got = quantized_block_sparse_attention(p.q, p.k, p.v, lists, **options)
    assert got.isfinite().all()
    p.q[:, :, 70, 0], p.v[:, :, 9, 3] = 0, 0
    p.k[:, :, 5, 3] = 1.5
    want = quantized_block_sparse_attention(p.q, p.k, p.v, lists, **options)
    torch.testing.assert_close(got[:, :, 64:], want[:, :, 64:], rtol=0, atol=0.03)
    torch.testing.assert_close(got[:, :, :64], want[:, :, :64], rtol=0, atol=0.1)


@pytest.mark.parametrize("precision", ["int8", "int8_fp8", "int4"])
def test_prepared_tensors_and_orders(precision: str) -> None:
    p = problem(Case("order", order=True, dtype=torch.bfloat16), "cpu")
    assert p.order is not None
    k, v = permute_tokens(p.k, p.order), permute_tokens(p.v, p.order)
    options: dict[str, Any] = {"precision": precision, "backend": "reference", "return_lse": True}
    out, lse = quantized_block_sparse_attention(p.q, k, v, p.lists, order=p.order, **options)
    made = quantize_qkv(p.q, p.k, p.v, precision, block_k=64, order=p.order, keys_ordered=False)
    again, lse_again = quantized_block_sparse_attention(p.q, p.k, p.v, p.lists, order=p.order, prepared=made, **options)
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)
    moved, moved_lse = quantized_block_sparse_attention(permute_tokens(p.q, p.order), k, v, p.lists, **options)
    torch.testing.assert_close(permute_tokens(out, p.order), moved, rtol=0, atol=1e-6)
    torch.testing.assert_close(permute_tokens(lse[..., None], p.order)[..., 0], moved_lse)


def test_density_one_of_16_bits_is_near() -> None:
    p = problem(Case("near", dtype=torch.bfloat16, pooled=True, density=0.5), "cpu")
    want = block_sparse_attention(p.q, p.k, p.v, p.lists, pooled=p.pooled, backend="reference")
    got = quantized_block_sparse_attention(
        p.q, p.k, p.v, p.lists, pooled=p.pooled, precision="int8", backend="reference"
    )
    assert isinstance(want, Tensor)
    assert isinstance(got, Tensor)
    assert (got.float() - want.float()).norm() / want.float().norm() < LOSS["int8"]


def test_full_graph_compile() -> None:
    p = problem(Case("compile", order=True, pooled=True, dtype=torch.bfloat16), "cpu")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return quantized_block_sparse_attention(
            q, k, v, p.lists, precision="int8_fp8", return_lse=True, backend="reference", **extras(p)
        )

    out, lse = torch.compile(run, fullgraph=True, backend="aot_eager")(p.q, p.k, p.v)
    want, want_lse = run(p.q, p.k, p.v)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


def test_custom_op_is_sound() -> None:
    p = problem(Case("op", dtype=torch.bfloat16), "cpu")
    made = quantize_qkv(p.q, p.k, p.v, "int8", block_k=64)
    lists = (p.lists.row_start, p.lists.full, None, p.lists.indices, 64, 64)
    for return_lse in (False, True):
        torch.library.opcheck(
            torch.ops.dit_accel_kernels.quantized_block_sparse_attention.default,
            (
                *(p.q, made.q, made.q_scale, made.k, made.k_scale, made.v.clone(), made.v_scale, made.k_mean),
                *("int8", "bf16", True, False, *lists, 0.125),
                *(None,) * 7,
                return_lse,
                "reference",
            ),
        )


def test_wrong_arguments_raise() -> None:
    p = problem(Case("wrong", dtype=torch.bfloat16), "cpu")

    def call(**options: Any) -> None:
        quantized_block_sparse_attention(p.q, p.k, p.v, p.lists, **{"precision": "int8", **options})

    with pytest.raises(ValueError, match="precision must be"):
        call(precision="bf16")
    with pytest.raises(ValueError, match="scale must be positive"):
        call(scale=0.0)
    with pytest.raises(ValueError, match="backend must be one of"):
        call(backend="cuda")
    with pytest.raises(ValueError, match="prepared must have"):
        call(prepared=quantize_qkv(p.q, p.k, p.v, "fp8", block_k=64))
    with pytest.raises(ValueError, match=r"prepared\.k must be"):
        call(prepared=quantize_qkv(p.q, p.k[:, :, 1:], p.v[:, :, 1:], "int8", block_k=64))


def test_a_backend_that_ignores_the_mask_fails_its_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    def dense(q: Tensor, made: Any, lists: Any, **options: Any) -> tuple[Tensor, Tensor]:
        full = torch.ones(1, 1, *(-(-x.shape[2] // 64) for x in (q, made.k)), dtype=torch.uint8)
        options.pop("return_lse")
        return quantized_reference(q, made, lists_from_levels(full, 64, 64), **options)

    def honest(*args: Any, return_lse: bool, **options: Any) -> tuple[Tensor, Tensor]:
        return quantized_reference(*args, **options)

    where: dict[str, Any] = {"device": "cpu", "dtype": torch.bfloat16, "head_dim": 64, "block_q": 64, "block_k": 64}
    for name, function, passes in (("dense", dense, False), ("honest", honest, True)):
        monkeypatch.setitem(backends.BACKENDS, name, Backend(name, lambda **_: None, function, ("cpu",)))
        for precision in PRECISIONS.values():
            reason = backends.self_test(name, precision=precision, **where)
            assert (reason is None) == passes, (precision, reason)
    with pytest.raises(RuntimeError, match="failed its self-test"):
        backends.require("dense", precision=PRECISIONS["int8"], **where)


def test_reasons_name_what_was_expected() -> None:
    where: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "head_dim": 64, "block_q": 64, "block_k": 64}
    assert "hopper" in str(backends.why_not("hoper", precision=PRECISIONS["int8"], **where))
    assert backends.why_not("hopper", precision=PRECISIONS["int8"], **where) is not None
    assert backends.why_not("triton", precision=PRECISIONS["int8"], **where) is not None
    assert backends.why_not("reference", precision=PRECISIONS["int8"], **where) is None
