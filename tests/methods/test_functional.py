"""The public block-sparse attention with a mask of the user's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_accel.functional import block_sparse_attention
from dit_accel.mask import BlockMask


def _problem(sq: int = 150, sk: int = 200, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, 3, n, 32, generator=gen) for n in (sq, sk, sk))
    mask = torch.rand(batch, 3, -(-sq // 32), -(-sk // 64), generator=gen) < 0.5
    mask[..., 0] = True
    return q, k, v, mask


def _oracle(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    logits = (q.double() @ k.double().mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    return logits.softmax(-1) @ v.double(), logits.logsumexp(-1)


@pytest.mark.parametrize("kind", ["bool", "levels", "block mask"])
def test_equals_masked_attention(kind: str) -> None:
    q, k, v, mask = _problem()
    seen = mask.repeat_interleave(32, 2)[:, :, :150].repeat_interleave(64, 3)[..., :200]
    wanted, lse = _oracle(q, k, v, seen)
    given: Tensor | BlockMask = mask
    if kind == "levels":
        given = mask.to(torch.uint8)
    elif kind == "block mask":
        given = BlockMask.from_levels(mask.to(torch.uint8), 150, 200, 32, 64)
    out, found = block_sparse_attention(q, k, v, given, block=(32, 64), return_lse=True)
    torch.testing.assert_close(out.double(), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.double(), lse, atol=1e-4, rtol=1e-4)


def test_one_mask_serves_all_heads_and_padding_is_left_out() -> None:
    q, k, v, mask = _problem()
    valid = torch.arange(200).expand(2, -1) < torch.tensor([[180], [130]])
    seen = mask[:1, :1].repeat_interleave(32, 2)[:, :, :150].repeat_interleave(64, 3)[..., :200] & valid[:, None, None]
    k = k.masked_fill(~valid[:, None, :, None], float("nan"))
    wanted, _ = _oracle(q, k.nan_to_num(), v, seen)
    out = block_sparse_attention(q, k, v, mask[:1, :1], block=(32, 64), key_valid=valid)
    assert isinstance(out, Tensor)
    torch.testing.assert_close(out.double(), wanted, atol=1e-4, rtol=1e-4)


def test_pooled_levels_of_the_last_ragged_block() -> None:
    q, k, v, mask = _problem(batch=1)
    levels = mask.to(torch.uint8)
    levels[..., -1] = 8
    out = block_sparse_attention(q, k, v, levels, block=(32, 64))
    assert isinstance(out, Tensor)
    pooled_k, pooled_v = k[:, :, 192:].mean(2, keepdim=True), v[:, :, 192:].mean(2, keepdim=True)
    seen = mask.repeat_interleave(32, 2)[:, :, :150].repeat_interleave(64, 3)[..., :192]
    logits = (q @ torch.cat((k[:, :, :192], pooled_k), 2).mT * 32**-0.5).double()
    logits[..., :192].masked_fill_(~seen, -torch.inf)
    logits[..., 192] += torch.tensor(8.0).log()
    wanted = logits.softmax(-1) @ torch.cat((v[:, :, :192], pooled_v), 2).double()
    torch.testing.assert_close(out.double(), wanted, atol=1e-4, rtol=1e-4)


def test_bad_input_says_what_was_expected() -> None:
    q, k, v, mask = _problem()
    with pytest.raises(ValueError, match=r"mask must be bool or uint8 levels, got torch.float32"):
        block_sparse_attention(q, k, v, mask.float(), block=(32, 64))
    with pytest.raises(ValueError, match=r"levels must be uint8 \[B, H, 3, 4\] for 150 x 200 tokens"):
        block_sparse_attention(q, k, v, mask, block=64)
    made = BlockMask.from_levels(mask.to(torch.uint8), 150, 200, 32, 64)
    with pytest.raises(ValueError, match=r"mask is for 150 x 200 tokens, got 150 x 100"):
        block_sparse_attention(q, k[:, :, :100], v[:, :, :100], made)
