"""Dense attention together with its log-sum-exp, from the fastest kernel that yields one on this device.

torch hides the normaliser that every fused kernel computes. Its ``aten`` operators return it, each in its own shape; here
it is always float32 ``[B, H, Sq]``, natural logarithm, ``-inf`` for a query that sees no key.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor
from torch.nn import functional as F

from ._common import check_bhsd
from .block_mass import attention_lse
from .types import BlockLists

__all__ = ["dense_attention", "dense_kernel", "lse_merge"]

_aten = torch.ops.aten
_HAS_XFORMERS = importlib.util.find_spec("xformers") is not None
# Fewer keys or query blocks leave our Hopper kernel too little to do to beat cuDNN's, whose normaliser costs it nothing.
_MIN_KEYS, _MIN_JOBS, _BLOCK = 8192, 512, 128


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    key_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over all keys, and its log-sum-exp.

    Args:
        q: ``[B, H, Sq, D]``, any strides, last dimension contiguous.
        k: ``[B, H, Sk, D]``, any strides, last dimension contiguous.
        v: ``[B, H, Sk, D]``, any strides, last dimension contiguous.
        scale: factor of the logits, ``D ** -0.5`` if ``None``.
        key_valid: bool ``[B, Sk]`` in the order of ``k``; padding must be finite. On GPUs without our Hopper kernel the
            normaliser then costs a second pass.

    Returns:
        ``[B, H, Sq, D]`` of the dtype of ``q``, laid out like ``q`` (a ``[B, S, H, D]`` model gets its own layout back),
        and float32 ``[B, H, Sq]``. A query that sees no key gets output 0 and log-sum-exp ``-inf``.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    check_bhsd("q", q)
    check_bhsd("k", k)
    check_bhsd("v", v)
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q, k and v must agree in B, H and D, and k and v in S, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if key_valid is not None and key_valid.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"key_valid must be {(k.shape[0], k.shape[2])}, got {tuple(key_valid.shape)}")
    return _dense_op(q, k, v, q.shape[3] ** -0.5 if scale is None else scale, key_valid)


def dense_kernel(q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None = None) -> str:
    """Name of the kernel that :func:`dense_attention` uses for these tensors.

    Returns:
        ``"hopper"`` (our block-sparse kernel with every block), ``"cudnn"``, ``"flash"``, ``"flash_cpu"``,
        ``"xformers"`` or ``"two_pass"`` (SDPA, then :func:`attention_lse`).
    """
    if q.device.type == "cpu":
        return "flash_cpu" if q.is_floating_point() else "two_pass"
    if _why_not_hopper(q, k, v, key_valid) is None:
        return "hopper"
    if q.device.type != "cuda" or key_valid is not None:
        return "two_pass"
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    if torch.backends.cuda.can_use_cudnn_attention(params):
        return "cudnn"
    # The flash operator takes only head sizes that are multiples of 8; SDPA pads, the operator does not.
    if q.shape[3] % 8 == 0 and torch.backends.cuda.can_use_flash_attention(params):
        return "flash"
    from .block_sparse.xformers import why_not_dense_xformers

    return "two_pass" if why_not_dense_xformers(q, k, v) else "xformers"


def _why_not_hopper(q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None) -> str | None:
    """Say why the block-sparse kernel for Hopper is not the one for a dense pass, or return ``None``."""
    from .backends import self_test, why_not
    from .block_sparse.hopper_launch import reroute_reason

    dim = q.shape[3]
    reason = why_not("hopper", device=q.device, dtype=q.dtype, head_dim=dim, block_q=_BLOCK, block_k=_BLOCK)
    if reason is None and key_valid is None:
        if q.dtype != torch.bfloat16:
            reason = f"without key_valid only bfloat16 gains, got {q.dtype}"
        jobs = q.shape[0] * q.shape[1] * -(-q.shape[2] // _BLOCK)
        if k.shape[2] < _MIN_KEYS or jobs < _MIN_JOBS:
            reason = f"at least {_MIN_KEYS} keys and {_MIN_JOBS} query blocks, got {k.shape[2]} and {jobs}"
    if reason is None:
        reason = reroute_reason(q, k, v, _every_block(q, k))
    return reason or self_test("hopper", q.device, q.dtype, dim, _BLOCK, _BLOCK)


def _every_block(q: Tensor, k: Tensor) -> BlockLists:
    """Lists of all key blocks, one row for all."""
    rows, count = -(-q.shape[2] // _BLOCK), -(-k.shape[2] // _BLOCK)
    start = torch.zeros(1, 1, rows, dtype=torch.int32, device=q.device)
    ids = torch.arange(count, dtype=torch.int32, device=q.device)
    return BlockLists(start, start + count, None, ids, _BLOCK, _BLOCK)


def lse_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    Uses ``xformers.ops.fmha.merge_attentions`` on CUDA when xFormers is installed, plain torch otherwise.

    Args:
        out_a: ``[B, H, S, D]`` attention over the first keys.
        lse_a: float32 ``[B, H, S]`` its log-sum-exp, natural logarithm, ``-inf`` where no key was seen.
        out_b: ``[B, H, S, D]`` attention over the other keys.
        lse_b: float32 ``[B, H, S]`` its log-sum-exp.

    Returns:
        ``[B, H, S, D]`` of the dtype of ``out_a`` and float32 ``[B, H, S]``.
    """
    if out_a.is_cuda and _HAS_XFORMERS:
        return _merge_xformers(out_a, lse_a, out_b, lse_b)
    return _merge_torch(out_a, lse_a, out_b, lse_b)


def _merge_torch(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    # Where neither saw a key both differences would be NaN; such rows stay 0.
    safe = lse.clamp(min=torch.finfo(torch.float32).min)
    weight_a = torch.exp(lse_a - safe)[..., None]
    weight_b = torch.exp(lse_b - safe)[..., None]
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), lse


def _merge_xformers(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    from xformers.ops import fmha

    # xFormers keeps [B, S, H, D] and an LSE of [B, H, S].
    outs = [out_a.transpose(1, 2), out_b.transpose(1, 2)]
    out, lse = fmha.merge_attentions(outs, [lse_a, lse_b], write_lse=True)
    return out.transpose(1, 2).to(out_a.dtype), lse


def _with_lse(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, scale: float, key_valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run one kernel; the log-sum-exp comes back in whatever shape that kernel uses."""
    if kernel == "hopper":
        from .block_sparse.hopper_launch import block_sparse_hopper

        return block_sparse_hopper(q, k, v, _every_block(q, k), scale=scale, key_valid=key_valid)
    if kernel == "xformers":
        from .block_sparse.xformers import dense_xformers

        return dense_xformers(q, k, v, scale)
    if kernel == "cudnn":
        return _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)[:2]
    if kernel == "flash":
        return _aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    if kernel == "flash_cpu":
        bias = None
        if key_valid is not None:
            bias = torch.zeros(key_valid.shape, dtype=q.dtype, device=q.device)
            bias = bias.masked_fill_(~key_valid, float("-inf"))[:, None, None]
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    mask = None if key_valid is None else key_valid[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out, attention_lse(q, k, scale=scale, key_valid=key_valid)


def _normal_lse(lse: Tensor, tokens: int) -> Tensor:
    """Any kernel's log-sum-exp as float32 ``[B, H, Sq]``: without a trailing 1 and without padding rows."""
    if lse.dim() == 4:
        lse = lse.squeeze(-1)
    return lse[:, :, :tokens].to(torch.float32)


@torch.library.custom_op("dit_accel_kernels::dense_attention", mutates_args=())
def _dense_op(q: Tensor, k: Tensor, v: Tensor, scale: float, key_valid: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse = _with_lse(dense_kernel(q, k, v, key_valid), q, k, v, scale, key_valid)
    lse = _normal_lse(lse, q.shape[2])
    if key_valid is not None:
        # Kernels differ in what they report for a batch element without any key: 0, NaN or -inf.
        seen = key_valid.any(1)[:, None, None]
        lse = torch.where(seen, lse, float("-inf"))
        out = torch.where(seen[..., None], out, 0.0)
    # The compiler was promised the layout of q; kernels that differ pay for a copy.
    promised = torch.empty_like(q)
    out = out if out.stride() == promised.stride() else promised.copy_(out)
    return out, lse.contiguous()


@_dense_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, key_valid: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
