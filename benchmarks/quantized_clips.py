"""What 8-bit attention changes in finished clips: PSNR against our 16-bit run of the same method, the same masks.

    python benchmarks/quantized_clips.py --out quantized-clips       # 65 frames, on a GPU a few minutes
    python benchmarks/quantized_clips.py --toy                       # small, for a CPU

Each method is run in 16 bits and in each 8-bit format, with the same prompts and seeds. Masks come from one plan, made once
by dense 16-bit runs of two other prompts, so they are the same. The second number is what the method itself costs against
dense attention: 8 bits should be far above it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "kernels", "patches", "eval", "benchmarks")]

from _timing import environment  # noqa: E402

import dit_accel  # noqa: E402
from dit_accel.demo.pipeline import load  # noqa: E402
from dit_accel_eval.files import write_json  # noqa: E402
from dit_accel_eval.generate import generate  # noqa: E402

# Label, method and its options; "dense" is all blocks of the same kernel.
METHODS: list[tuple[str, str, dict[str, Any]]] = [
    ("dense", "dense", {}),
    ("paro 0.5", "paro", {"density": 0.5}),
    ("paro 0.3", "paro", {"density": 0.3}),
]
PRECISIONS = ("int8", "int8_fp8", "fp8", "int8_int8")


@dataclass(frozen=True)
class Clips:
    """Frames of all prompts, and the share of blocks that was computed."""

    frames: list[np.ndarray]
    work: float


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples/tiny_wan")
    parser.add_argument("--first", type=int, default=16, help="number of the first prompt")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--frames", type=int, default=65)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--block", type=int, default=128, help="tokens of a block; the Hopper kernel wants 128")
    parser.add_argument(
        "--precisions", nargs="+", default=list(PRECISIONS), help="as enable() takes them, rotated or not"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="one prompt, 9 frames of 64 pixels, 4 steps, blocks of 32")
    parser.add_argument("--out", type=Path, help="write NAME.json")
    args = parser.parse_args()
    if args.toy:
        args.prompts, args.frames, args.size, args.steps, args.block = 1, 9, 64, 4, 32
    return args


def psnr(a: list[np.ndarray], b: list[np.ndarray]) -> list[float]:
    """Of each clip, in dB; infinity becomes 99."""
    errors = [float(((x.astype(np.float32) - y.astype(np.float32)) ** 2).mean()) for x, y in zip(a, b)]
    return [10 * math.log10(255**2 / max(e, 1e-6)) if e else 99.0 for e in errors]


def prompts(args: argparse.Namespace) -> list[str]:
    text = (args.model / "prompts.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in text if line.strip()]


def sizes(args: argparse.Namespace) -> dict[str, Any]:
    size = {"height": args.size, "width": args.size, "num_frames": args.frames}
    return size | {"num_inference_steps": args.steps, "guidance_scale": 4.0}


def in_precision(options: dict[str, Any], precision: str) -> dict[str, Any]:
    """Options with another precision; that of a plan belongs to the plan's method."""
    if "plan" not in options:
        return options | {"precision": precision}
    plan = options["plan"]
    return {"plan": replace(plan, method=replace(plan.method, precision=precision), _plans={}, _plans_of=None)}


def run(pipe: Any, args: argparse.Namespace, method: str | None, options: dict[str, Any]) -> Clips:
    """Generate all clips, with ``method`` or untouched."""
    chosen = prompts(args)[args.first : args.first + args.prompts]
    seeds = list(range(args.first, args.first + len(chosen)))
    if method is None:
        return Clips(list(generate(pipe, chosen, seeds, **sizes(args)).frames), 1.0)
    with dit_accel.enabled(pipe, method, min_tokens=0, **options) as handle:
        made = generate(pipe, chosen, seeds, **sizes(args))
        (stats,) = handle.stats().values()
    return Clips(list(made.frames), stats.density)


def main() -> None:
    args = arguments()
    pipe = load(args.model, torch.device(args.device))
    plain = run(pipe, args, None, {})
    rows: list[dict[str, Any]] = []
    for label, method, options in METHODS:
        blocks: dict[str, Any] = {"block_q": args.block, "block_k": args.block}
        if method != "dense":
            plan = dit_accel.calibrate(pipe, prompts(args)[:2], method, overrides=options | blocks, **sizes(args))
            options, blocks = {"plan": plan}, {}
        wide = run(pipe, args, method, options | blocks)
        found = np.mean(psnr(wide.frames, plain.frames))
        print(f"{label:<10} bf16       against dense {found:6.2f} dB, work {wide.work:.4f}", flush=True)
        for precision in args.precisions:
            began = time.perf_counter()
            made = run(pipe, args, method, in_precision(options | blocks, precision))
            same, dense = psnr(made.frames, wide.frames), psnr(made.frames, plain.frames)
            row = {"method": label, "precision": precision, "psnr": float(np.mean(same)), "worst": min(same)}
            rows.append(row | {"against_dense": float(np.mean(dense)), "work": made.work, "work_16_bit": wide.work})
            print(
                f"{label:<10} {precision:<10} against 16 bit {row['psnr']:6.2f} dB, worst {row['worst']:6.2f}, "
                f"against dense {np.mean(dense):6.2f}, work {made.work:.4f}, {time.perf_counter() - began:.0f} s",
                flush=True,
            )
            if args.out is not None:
                about = {"environment": environment(torch.device(args.device)), "frames": args.frames}
                about |= {"steps": args.steps, "prompts": args.prompts, "block": args.block, "size": args.size}
                write_json(args.out.with_suffix(".json"), {**about, "rows": rows})


if __name__ == "__main__":
    main()
