"""What the correction at mean queries costs beside dense attention: python benchmarks/query_means.py, on a GPU.

First it is held against its reference on a small shape. ``--toy`` runs all of it small, on a CPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "kernels", "benchmarks")]

from _timing import environment, measure  # noqa: E402

from dit_accel_kernels import block_stats, pack_bits  # noqa: E402
from dit_accel_kernels.query_means import add_query_means_, mean_query_residual  # noqa: E402
from dit_accel_kernels.types import Pooled, TokenOrder  # noqa: E402


def problem(
    heads: int, tokens: int, dim: int, block: int, device: str
) -> tuple[list[torch.Tensor], Pooled, TokenOrder]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    query, key, value = (torch.randn(1, heads, tokens, dim, device=device, dtype=dtype) for _ in range(3))
    count = -(-tokens // block)
    bits = pack_bits((torch.rand(1, heads, count, count, device=device) < 0.2).to(torch.uint8))
    keys = block_stats(key, block=block)
    pooled = Pooled(keys.mean, block_stats(value, block=block).mean, keys.count.float().log()[:, None], bits)
    table = torch.randperm(tokens, device=device).int()[None]
    return [query, key, value], pooled, TokenOrder(table, torch.zeros(heads, dtype=torch.int32, device=device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=75648)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not args.toy else "cpu"
    if args.toy:
        args.heads, args.tokens, args.dim = 2, 2000, 64
    (query, key, value), pooled, order = problem(2, 1000, args.dim, args.block, device)
    settings: dict[str, Any] = {"order": order, "block_q": args.block, "block_k": args.block, "scale": args.dim**-0.5}
    right = mean_query_residual(query, key, value, pooled, backend="reference", **settings).float()
    error = (mean_query_residual(query, key, value, pooled, **settings).float() - right).norm() / right.norm()
    if not error < 0.03:
        raise SystemExit(f"the correction differs from its reference by {float(error):.4f}")
    (query, key, value), pooled, order = problem(args.heads, args.tokens, args.dim, args.block, device)
    settings["order"] = order
    rows = mean_query_residual(query, key, value, pooled, **settings)
    runs = {
        "dense": lambda: scaled_dot_product_attention(query, key, value),
        "residual": lambda: mean_query_residual(query, key, value, pooled, **settings),
        "sum": lambda: add_query_means_(query, rows, order=order, block_q=args.block),
    }
    times = {name: measure(run, torch.device(device)).p50_ms for name, run in runs.items()}
    print(
        *environment(torch.device(device)).values(), f"H{args.heads} S{args.tokens} d{args.dim}, blocks of {args.block}"
    )
    for name, time in times.items():
        print(f"{name:9} {time:9.3f} ms  {time / times['dense']:.3f} of dense")


if __name__ == "__main__":
    main()
