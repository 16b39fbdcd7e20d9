"""Merging of two attentions through their log-sum-exp, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.interpreter import repair


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = q.float() @ k.float().mT * 0.3
    return torch.softmax(x, -1) @ v.float(), x.logsumexp(-1)


@pytest.mark.interpreter
@pytest.mark.parametrize("dim", [40, 64])
@pytest.mark.parametrize("smooth", [True, False])
def test_two_attentions_become_one(dim: int, smooth: bool) -> None:
    repair()
    from dit_accel_kernels.quantized.hopper8_merge import merge

    gen = torch.Generator().manual_seed(dim)
    q, k, v = (torch.randn(2, 3, tokens, dim, generator=gen) for tokens in (70, 50, 50))
    k = k + 1
    mean = k[:, :, :20].mean(2) if smooth else None
    first = k[:, :, :20] if mean is None else k[:, :, :20] - mean[:, :, None]
    out, lse = _attend(q, first, v[:, :, :20])
    other, other_lse = _attend(q, k[:, :, 20:], v[:, :, 20:])
    # Rows without keys in either, in the first and in the second attention.
    for rows, empties in ((slice(0, 2), (0, 1)), (slice(2, 4), (0,)), (slice(4, 6), (1,))):
        for which in empties:
            o, x = ((out, lse), (other, other_lse))[which]
            o[:, :, rows], x[:, :, rows] = 0, -torch.inf
    want, want_lse = _attend(q, k, v)
    alone = _attend(q, k[:, :, 20:], v[:, :, 20:]), _attend(q, k[:, :, :20], v[:, :, :20])
    for rows, (o, x) in ((slice(2, 4), alone[0]), (slice(4, 6), alone[1])):
        want[:, :, rows], want_lse[:, :, rows] = o[:, :, rows], x[:, :, rows]
    want[:, :, :2], want_lse[:, :, :2] = 0, -torch.inf
    bshd = out.transpose(1, 2).contiguous().transpose(1, 2)  # another layout than that of the queries
    merge(q, mean, bshd, lse, other, other_lse, 0.3)
    torch.testing.assert_close(bshd, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.interpreter
def test_the_mean_key_is_given_back() -> None:
    repair()
    from dit_accel_kernels.quantized.hopper8_merge import add_mean

    gen = torch.Generator().manual_seed(0)
    q, mean, lse = (torch.randn(*shape, generator=gen) for shape in ((1, 2, 33, 64), (1, 2, 64), (1, 2, 33)))
    lse[0, 1, 3] = -torch.inf
    want = lse + torch.einsum("bhsd,bhd->bhs", q, mean) * 0.125
    add_mean(q, mean, lse, 0.125)
    torch.testing.assert_close(lse, want, atol=1e-5, rtol=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_remainder_is_merged_in(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole path but for the two kernels, for which their references stand in."""
    repair()
    from dit_accel_kernels.block_sparse import hopper_launch
    from dit_accel_kernels.block_sparse.reference import block_sparse_reference
    from dit_accel_kernels.lists import lists_from_levels, pack_bits
    from dit_accel_kernels.quantize import quantize_qkv
    from dit_accel_kernels.quantized import hopper8_launch
    from dit_accel_kernels.quantized.reference import quantized_reference
    from dit_accel_kernels.types import Pooled

    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, 64, generator=gen).bfloat16() for _ in range(3))
    made = quantize_qkv(q, k + 1, v, precision, block_k=64, backend="reference")
    levels = (torch.rand(1, 2, 3, 5, generator=gen) < 0.4).to(torch.uint8)
    means = [torch.randn(1, 2, 5, 64, generator=gen).bfloat16() for _ in range(2)]
    pooled = Pooled(*means, torch.full((1, 1, 5), 4.0), pack_bits(levels))
    lists = replace(lists_from_levels(levels, 128, 64), partial=None)

    def blocks(q, made, lists, scale, order, return_lse, config):  # type: ignore[no-untyped-def]
        return quantized_reference(q, replace(made, k_mean=None), lists, scale=scale, order=order)

    def remainder(q, k, v, lists, **kwargs):  # type: ignore[no-untyped-def]
        assert k.shape[:3] == (1, 2, 300)
        assert k.dtype == q.dtype
        assert not lists.full.any()
        nothing = torch.zeros(1, 2, 300, 64, dtype=q.dtype)
        return block_sparse_reference(q, nothing, nothing, lists, **kwargs)

    monkeypatch.setattr(hopper8_launch, "_exact_blocks", blocks)
    monkeypatch.setattr(hopper_launch, "block_sparse_hopper", remainder)
    out, lse = hopper8_launch.quantized_hopper(q, made, lists, scale=0.125, pooled=pooled)
    want, want_lse = quantized_reference(q, made, lists, scale=0.125, pooled=pooled)
    torch.testing.assert_close(out.float(), want.float(), atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=1e-4)
