"""Special cases on a GPU: CUDA graphs, ``torch.compile(fullgraph=True)``, inputs of more than 2**31 elements."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from dit_accel_kernels import BlockLists, backends, block_mass, block_sparse_attention, dense_attention
from dit_accel_kernels.lists import lists_from_levels

__all__ = ["special"]


def _problem(tokens: int = 2000, dim: int = 128) -> tuple[Tensor, Tensor, Tensor, BlockLists]:
    gen = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, 4, dim, generator=gen, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(3)
    )
    blocks = -(-tokens // 128)
    levels = (torch.rand(1, 4, blocks, blocks, generator=gen, device="cuda") < 0.4).to(torch.uint8)
    return q, k, v, lists_from_levels(levels, 128, 128)


def graph() -> str | None:
    """Captured calls must give the bits of eager ones, on inputs that came after the capture."""
    q, k, v, lists = _problem()

    def call() -> tuple[Tensor, ...]:
        out, lse = block_sparse_attention(q, k, v, lists, return_lse=True)
        dense, dense_lse = dense_attention(q, k, v)
        return out, lse, dense, block_mass(q, k, dense_lse, block_q=128, block_k=128)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        static = call()
    for _ in range(3):
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
        captured.replay()
        torch.cuda.synchronize()
        for name, got, want in zip(("out", "lse", "dense", "mass"), static, call(), strict=True):
            if not torch.equal(got, want):
                return f"{name} of the graph differs"
    return None


def compiled() -> str | None:
    """One graph, and the numbers of eager mode."""
    q, k, v, lists = _problem()

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = block_sparse_attention(q * 1.5, k, v, lists, return_lse=True)
        return torch.nn.functional.gelu(out) * torch.sigmoid(lse)[..., None]  # minus infinity in rows without keys

    got = torch.compile(step, fullgraph=True, dynamic=False)(q, k, v)
    worst = (got.float() - step(q, k, v).float()).abs().max().item()
    return None if worst < 0.1 else f"compiled output differs by {worst:.3g}"


def large() -> str | None:
    """More than 2**31 elements a tensor: rows of the last head against the keys of their lists."""
    heads, tokens, dim = 136, 131072, 128
    gen = torch.Generator("cuda").manual_seed(0)
    shape = (1, tokens, heads, dim)
    q, k, v = (
        torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(generator=gen).transpose(1, 2) for _ in range(3)
    )
    blocks = tokens // 128
    picks = torch.rand(1, 1, blocks, blocks, generator=gen, device="cuda").topk(3, -1).indices.sort(-1).values.int()
    start = torch.arange(blocks, device="cuda", dtype=torch.int32)[None, None] * 3
    lists = BlockLists(start, torch.full_like(start, 3), None, picks.flatten().contiguous(), 128, 128)
    for backend in ("hopper", "triton"):
        out = block_sparse_attention(q, k, v, lists, backend=backend)
        assert isinstance(out, Tensor)
        for head in (0, 67, heads - 1):
            for block in (0, 500, blocks - 1):
                keys = (picks[0, 0, block].long()[:, None] * 128 + torch.arange(128, device="cuda")).flatten()
                rows = slice(block * 128, block * 128 + 128)
                x, y, z = q[0, head, rows].float(), k[0, head, keys].float(), v[0, head, keys].float()
                want = torch.softmax(x @ y.mT * dim**-0.5, -1) @ z
                error = ((out[0, head, rows].float() - want).norm() / want.norm()).item()
                if not error < 8e-3:
                    return f"{backend}, head {head}, block {block}: relative error {error:.3g}"
        del out
    return None


def _trust() -> None:
    """Mark the backends as tested: the stress calls compare more, and a self-test compiles ten kernels."""
    for name in ("hopper", "triton"):
        backends._self_tests[name, backends._where(torch.device("cuda")), torch.bfloat16, 128, 128, 128] = None


def special(say: Callable[[str], None]) -> int:
    """Run all; 1 if any fails."""
    failed = 0
    _trust()
    for name, check in (("CUDA graph", graph), ("torch.compile", compiled), ("more than 2**31 elements", large)):
        began = time.monotonic()
        try:
            wrong = check()
        except Exception as error:
            wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        failed += wrong is not None
        say(f"{name}: {wrong or 'ok'} ({time.monotonic() - began:.0f} s)")
    return min(failed, 1)
