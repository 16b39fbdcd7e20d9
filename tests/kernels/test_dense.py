"""Dense attention with its log-sum-exp: shape, base and layout of every kernel, and the merge of two halves."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor

from dit_accel_kernels import (
    TokenOrder,
    attention_lse,
    block_mass,
    block_stats,
    dense,
    dense_attention,
    dense_kernel,
    invert_order,
    lse_merge,
    permute_and_pool,
    permute_tokens,
    unpermute_tokens,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OUT_TOLERANCE = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def oracle(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    logits = q.double() @ k.double().transpose(2, 3) * q.shape[3] ** -0.5
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None], float("-inf"))
    return torch.softmax(logits, -1).nan_to_num(0.0) @ v.double(), logits.logsumexp(-1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["BHSD", "BSHD", "fused"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [(torch.float32, 64), (torch.bfloat16, 128), (torch.float16, 96), (torch.bfloat16, 72), (torch.bfloat16, 64)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_equals_the_oracle(device: str, layout: str, masked: bool, dtype: torch.dtype, dim: int) -> None:
    if layout == "BHSD":
        q, k, v = (torch.randn(2, 3, 111, dim, dtype=dtype, device=device) for _ in range(3))
    elif layout == "BSHD":
        q, k, v = (torch.randn(2, 111, 3, dim, dtype=dtype, device=device).transpose(1, 2) for _ in range(3))
    else:
        q, k, v = torch.randn(2, 111, 3, 3, dim, dtype=dtype, device=device).transpose(1, 3).unbind(2)
    valid = None
    if masked:
        valid = torch.rand(2, 111, device=device) > 0.3
        valid[1] = False
    out, lse = dense_attention(q, k, v, key_valid=valid)
    want, want_lse = oracle(q, k, v, valid)
    assert out.dtype == dtype
    assert out.stride() == torch.empty_like(q).stride()
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-3, rtol=0)
    torch.testing.assert_close(out.double(), want, atol=OUT_TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_queries_and_keys_of_different_length(device: str) -> None:
    q = torch.randn(1, 2, 63, 64, dtype=torch.bfloat16, device=device)
    k, v = (torch.randn(1, 2, 200, 64, dtype=torch.bfloat16, device=device) for _ in range(2))
    out, lse = dense_attention(q, k, v, scale=0.2)
    torch.testing.assert_close(lse, attention_lse(q, k, scale=0.2, backend="reference"), atol=1e-3, rtol=0)
    assert out.shape == q.shape


@pytest.mark.gpu
def test_gpu_uses_a_fused_kernel() -> None:
    q = torch.randn(1, 2, 4096, 128, dtype=torch.bfloat16, device="cuda")
    assert dense_kernel(q, q, q) in ("cudnn", "flash")


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["cudnn", "flash", "two_pass"])
@pytest.mark.parametrize("tokens", [111, 1000, 4097])
def test_each_gpu_kernel_reports_the_same_normaliser(kernel: str, tokens: int) -> None:
    """Padding and base differ between kernels and releases of torch; every one must come out alike."""
    q, k, v = (torch.randn(2, tokens, 3, 128, dtype=torch.bfloat16, device="cuda").transpose(1, 2) for _ in range(3))
    _, raw = dense._with_lse(kernel, q, k, v, 128**-0.5, None)
    got = dense._normal_lse(raw, tokens)
    want = attention_lse(q, k, backend="reference")
    torch.testing.assert_close(got, want, atol=1e-3, rtol=0)


def test_fake_kernel_agrees_with_the_real_one() -> None:
    tests = ("test_schema", "test_faketensor")
    op = torch.ops.dit_accel_kernels.dense_attention
    for q in (torch.randn(1, 2, 40, 16), torch.randn(1, 40, 2, 16).transpose(1, 2)):
        torch.library.opcheck(op, (q, q.clone(), q.clone(), 0.25, None), test_utils=tests)


@pytest.mark.no_poison  # the poisoned torch.empty is not torch's, so it breaks the graph
def test_every_small_operator_compiles_into_one_graph() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, table: Tensor, head: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        order = TokenOrder(table, head)
        out, lse = dense_attention(q, k, v, key_valid=valid)
        mass = block_mass(q, k, attention_lse(q, k), block_q=32, block_k=32, order=order)
        pool = permute_and_pool(k, v, order, block=32, key_valid=valid)
        back = unpermute_tokens(permute_tokens(v, order), order)
        return *lse_merge(out, lse, back, lse), mass, pool.mean_k, block_stats(k, block=32).absmax, invert_order(table)

    q, k, v = (torch.randn(1, 100, 2, 64).transpose(1, 2) for _ in range(3))
    arguments = (q, k, v, torch.randperm(100).int()[None], torch.zeros(2, dtype=torch.int32), torch.rand(1, 100) > 0.2)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(got, step(*arguments))


def test_merge_of_two_halves_is_the_whole() -> None:
    q, k, v = (torch.randn(2, 3, 100, 64) for _ in range(3))
    a, b = (dense_attention(q, k[:, :, part], v[:, :, part]) for part in (slice(0, 30), slice(30, None)))
    out, lse = lse_merge(*a, *b)
    want, want_lse = dense_attention(q, k, v)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=0)


def test_merge_with_nothing() -> None:
    out, lse = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4)
    empty, none = torch.zeros_like(out), torch.full_like(lse, float("-inf"))
    torch.testing.assert_close(lse_merge(out, lse, empty, none), (out, lse))
    torch.testing.assert_close(lse_merge(empty, none, empty, none), (empty, none))


def test_xformers_is_asked_in_its_own_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """xFormers merges ``[B, S, H, D]``; a stand-in checks what reaches it and what comes back."""
    seen: dict[str, object] = {}

    def merge_attentions(outs: list[Tensor], lses: list[Tensor], write_lse: bool) -> tuple[Tensor, Tensor]:
        seen.update(shapes=[tuple(x.shape) for x in (*outs, *lses)], write_lse=write_lse)
        return outs[0], lses[1]

    fmha = types.ModuleType("xformers.ops.fmha")
    fmha.merge_attentions = merge_attentions  # type: ignore[attr-defined]
    ops = types.ModuleType("xformers.ops")
    ops.fmha = fmha  # type: ignore[attr-defined]
    for name, module in {
        "xformers": types.ModuleType("xformers"),
        "xformers.ops": ops,
        "xformers.ops.fmha": fmha,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    out, lse = torch.randn(2, 3, 40, 8), torch.randn(2, 3, 40)
    merged, merged_lse = dense._merge_xformers(out, lse, out.clone(), lse + 1)
    assert seen == {"shapes": [(2, 40, 3, 8)] * 2 + [(2, 3, 40)] * 2, "write_lse": True}
    assert torch.equal(merged, out)
    assert torch.equal(merged_lse, lse + 1)


def test_xformers_is_used_only_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("xFormers has no CPU kernel")

    monkeypatch.setattr(dense, "_HAS_XFORMERS", True)
    monkeypatch.setattr(dense, "_merge_xformers", refuse)
    out, lse = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4)
    lse_merge(out, lse, out, lse)


def test_shape_errors_say_what_was_expected() -> None:
    q = torch.randn(1, 2, 10, 16)
    with pytest.raises(ValueError, match="must agree in B, H and D"):
        dense_attention(q, q[:, :1], q)
    with pytest.raises(ValueError, match=r"must have one dtype, got torch.float32, torch.float16"):
        dense_attention(q, q.half(), q)
