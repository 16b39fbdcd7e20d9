"""What the host pays for one attention call: microseconds of Python and launches, on short sequences.

    python benchmarks/host_overhead.py [--profile]

The GPU work is so short that the host is the bound; the time is taken before the device has finished.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "kernels", "patches", "eval")]

import dit_accel  # noqa: E402
from dit_accel.presets import get_method  # noqa: E402
from dit_accel.runtime import ModelRun  # noqa: E402

CALLS = 300


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA on ``[B, S, H, D]``."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def per_call(call: Callable[[], object]) -> float:
    """Microseconds of host time of one call."""
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent / CALLS * 1e6


def sparse_call(name: str, qkv: list[Tensor], geometry: dit_accel.TokenGeometry) -> Callable[[], Tensor]:
    """A sparse step of one layer whose plan is made."""
    run = ModelRun(get_method(name), model="overhead", min_tokens=0)
    run.set_layers(("layer",))
    for step in range(3):
        run.begin_forward(geometry, dit_accel.StepInfo(step=step, steps=10))
        run.attend(*qkv, layer=0, scale=None, key_valid=None, dense=dense)
    return lambda: run.attend(*qkv, layer=0, scale=None, key_valid=None, dense=dense)


def main() -> None:
    """Print the table, and a profile of the last method if asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true", help="show where the host time of auto goes")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: needs a GPU")
    geometry = dit_accel.TokenGeometry((4, 16, 16))
    qkv = [torch.randn(1, geometry.tokens, 5, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    print(f"{torch.cuda.get_device_name()}: host time of one attention call, microseconds")
    print(f"{'dense (SDPA)':14} {per_call(lambda: dense(*qkv)):8.1f}")
    for name in ("na", "adaspa", "auto"):
        print(f"{name:14} {per_call(sparse_call(name, qkv, geometry)):8.1f}")
    if args.profile:
        call = sparse_call("auto", qkv, geometry)
        call()
        profile = cProfile.Profile()
        profile.runcall(lambda: [call() for _ in range(CALLS)])
        text = io.StringIO()
        pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(28)
        print(text.getvalue())


if __name__ == "__main__":
    main()
