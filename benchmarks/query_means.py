"""What the correction at mean queries costs beside dense attention: ``python benchmarks/query_means.py``, on a GPU.

First it is held against its reference on small shapes. Then each part takes turns with dense cuDNN attention of the same
shape; the median of the rounds counts. *Share* is time over dense time, times the tokens of a mean: 1 says that a row of
the correction costs what one of dense attention does. ``--toy`` runs all of it small, on a CPU if need be, without times.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "kernels", "eval", "benchmarks")]

from _records import append  # noqa: E402
from _turns import CUDNN, dense, in_turns  # noqa: E402

from dit_accel_kernels import block_stats, pack_bits  # noqa: E402
from dit_accel_kernels.query_means import add_query_means_, mean_queries, mean_query_residual  # noqa: E402
from dit_accel_kernels.types import Pooled, TokenOrder  # noqa: E402

# Heads, tokens, head size: Wan 14B at 720p and at 480p, Wan 1.3B at 480p, FLUX at 1024 x 1024, CogVideoX.
SHAPES = {
    "H40 S75648 d128": (40, 75648, 128),
    "H40 S32760 d128": (40, 32760, 128),
    "H12 S32760 d128": (12, 32760, 128),
    "H24 S4608 d128": (24, 4608, 128),
    "H48 S17776 d64": (48, 17776, 64),
}
BLOCK_K = 64


def problem(
    heads: int, tokens: int, dim: int, block_q: int, device: str
) -> tuple[tuple[Tensor, Tensor, Tensor], Pooled, TokenOrder]:
    """q as a model has it, k and v in block order, a fifth of the blocks kept, a random order for every other head."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    query = torch.randn(1, tokens, heads, dim, device=device, dtype=dtype)
    query += 2 * torch.randn(1, 1, heads, dim, device=device, dtype=dtype)  # lest mean queries be nearly 0
    key, value = (torch.randn(1, heads, tokens, dim, device=device, dtype=dtype) for _ in range(2))
    rows, cols = -(-tokens // block_q), -(-tokens // BLOCK_K)
    bits = pack_bits((torch.rand(1, heads, rows, cols, device=device) < 0.2).to(torch.uint8))
    keys = block_stats(key, block=BLOCK_K)
    pooled = Pooled(keys.mean, block_stats(value, block=BLOCK_K).mean, keys.count.float().log()[:, None], bits)
    table = torch.stack([torch.randperm(tokens, device=device).int() for _ in range(2)])
    order = TokenOrder(table, torch.arange(heads, dtype=torch.int32, device=device) % 2)
    return (query.transpose(1, 2), key, value), pooled, order


def check(device: str) -> None:
    """Hold a small correction of each head size against the reference.

    Raises:
        SystemExit: they differ.
    """
    for dim in (128, 64):
        tensors, pooled, order = problem(2, 1000, dim, 64, device)
        settings: dict[str, Any] = {"order": order, "block_q": 64, "block_k": BLOCK_K, "scale": dim**-0.5}
        right = mean_query_residual(*tensors, pooled, backend="reference", **settings).float()
        error = (mean_query_residual(*tensors, pooled, **settings).float() - right).norm() / right.norm()
        if not error < 0.02:
            raise SystemExit(f"the correction differs from its reference by {float(error):.4f}")


def parts(block_q: int, heads: int, tokens: int, dim: int, device: str) -> tuple[Any, dict[str, Any]]:
    """Dense attention and everything else that is timed."""
    (query, key, value), pooled, order = problem(heads, tokens, dim, block_q, device)
    settings: dict[str, Any] = {"order": order, "block_q": block_q, "block_k": BLOCK_K, "scale": dim**-0.5}
    rows = mean_query_residual(query, key, value, pooled, **settings)
    shape: dict[str, Any] = {"order": order, "block_q": block_q}
    return partial(dense, query, key, value), {
        "mean queries": partial(mean_queries, query, **shape),
        "correction, means included": partial(mean_query_residual, query, key, value, pooled, **settings),
        "the same, Triton": partial(mean_query_residual, query, key, value, pooled, backend="triton", **settings),
        "sum with the output": partial(add_query_means_, torch.zeros_like(query), rows, **shape),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table and append to a record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--blocks", nargs="*", type=int, default=[128, 64], help="tokens of a mean")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    parser.add_argument("--toy", action="store_true", help="a tiny shape, nothing is timed")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(device)
    if args.toy or device == "cpu":
        for name, call in parts(64, 2, 500, 64, device)[1].items():
            if device == "cuda" or "Triton" not in name:
                call()
                print(f"{name}: ran")
        return 0
    for shape in args.shapes:
        for block_q in args.blocks:
            attend, calls = parts(block_q, *SHAPES[shape], device)
            rows = in_turns(
                shape, str(block_q), {CUDNN: (attend, 1.0)} | {n: (c, 1.0) for n, c in calls.items()}, args.rounds
            )
            times, records = {row.what: row.ms for row in rows}, []
            for name in calls:
                part = times[name] / times[CUDNN]
                records.append({"part": name, "ms": times[name], "of_dense": part})
                print(
                    f"{shape:<16} means of {block_q:<4} {name:<28} {times[name]:>8.3f} ms {100 * part:>6.2f} % of "
                    f"{times[CUDNN]:.3f}, share {part * block_q:.2f}",
                    flush=True,
                )
            append(args.out, shape, times[CUDNN], records, block_q=block_q, block_k=BLOCK_K)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
