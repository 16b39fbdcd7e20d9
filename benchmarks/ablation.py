"""What each part of ``auto`` is worth: the preset with one part changed, at equal work. Makes the table of docs/auto.md.

    python benchmarks/ablation.py --workers 6 --out benchmarks/results/ablation.jsonl      # on a GPU
    python benchmarks/ablation.py --toy                                                    # one prompt, small, on a CPU
    python benchmarks/ablation.py --table benchmarks/results/ablation.jsonl                # the table of what is there

Prompts are those that the methods table does not use. Every row generates all of them in one batch, dense and with the
method, from the same noise; PSNR is of raw frames, work is what the engine counted over the whole run. Workers take rows
in turns and append to one file each, ``--out`` with the worker's number; ``--table`` reads all of them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "kernels", "patches", "eval")]

import dit_accel  # noqa: E402
from dit_accel.demo.pipeline import load  # noqa: E402
from dit_accel.env import gpus, versions  # noqa: E402
from dit_accel_eval.files import append_record, read_records  # noqa: E402
from dit_accel_eval.generate import generate  # noqa: E402

#: What most variants start from: one density over the run, one budget for all heads of a layer.
PLAIN: dict[str, Any] = {
    "density": 0.2,
    "refresh": [],
    "reuse": ["every:6"],
    "select": "top_k_layer",
    "block_q": 64,
    "block_k": 64,
}
BRICKS = ["fhw", "fwh", "hwf", "hfw", "whf", "wfh", "brick:4x4x4", "gilbert"]
FALL: dict[str, Any] = {"select": "top_k_layer", "warmup": 0.0334, "block_q": 64}

ONE_MEAN: dict[str, Any] = {"compensate": "query_mean"}

#: Label, method, options besides the work.
ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("auto", "auto", {}),
    ("auto, query blocks of 64", "auto", {"block_q": 64}),
    ("auto, mean queries over 32", "auto", {"compensate": "query_mean:32"}),
    ("auto, query blocks of 64, mean queries over 32", "auto", {"block_q": 64, "compensate": "query_mean:32"}),
    ("auto, one mean query a block", "auto", ONE_MEAN),
    ("auto, steeper fall, one mean query a block", "auto", {**ONE_MEAN, "density": [0.5, 0.05]}),
    ("auto, gentler fall, one mean query a block", "auto", {**ONE_MEAN, "density": [0.3, 0.15]}),
    ("auto, one dense step, one mean query a block", "auto", {**ONE_MEAN, "warmup": 0.0334}),
    ("auto, one budget a layer", "auto", {"select": "top_k_layer"}),
    ("auto, one density", "auto", {"density": 0.3}),
    ("auto, no dense step", "auto", {"warmup": 0.0}),
    ("auto, one density, no dense step", "auto", {"density": 0.3, "warmup": 0.0}),
    ("auto, gentler fall, no dense step", "auto", {"density": [0.3, 0.2], "warmup": 0.0}),
    ("auto, rising density, no dense step", "auto", {"density": [0.2, 0.3], "warmup": 0.0}),
    ("plain", "auto", PLAIN),
    ("plain, one budget a head", "auto", {**PLAIN, "select": "top_k_head"}),
    ("plain, one budget a row", "auto", {**PLAIN, "select": "top_k"}),
    ("plain, planned once", "auto", {**PLAIN, "reuse": []}),
    ("plain, planned every 3 steps", "auto", {**PLAIN, "reuse": ["every:3"]}),
    ("plain, planned every 12 steps", "auto", {**PLAIN, "reuse": ["every:12"]}),
    ("plain, branches plan apart", "auto", {**PLAIN, "branches": "separate"}),
    ("plain, means without correction", "auto", {**PLAIN, "compensate": "mean"}),
    ("plain, skipped blocks dropped", "auto", {**PLAIN, "compensate": "drop"}),
    ("plain, order by recalled mass", "auto", {**PLAIN, "order_choice": "recall"}),
    ("plain, blocks by exact mass", "auto", {**PLAIN, "score": "mass", "order_choice": "recall", "select": "top_k"}),
    ("plain, bricks and Gilbert besides", "auto", {**PLAIN, "order": BRICKS}),
    ("plain, raster", "auto", {**PLAIN, "order": ["raster"], "order_choice": "fixed"}),
    ("plain, one dense step", "auto", {**PLAIN, "warmup": 0.0334}),
    ("plain, no dense step", "auto", {**PLAIN, "warmup": 0.0}),
    ("plain, key blocks of 32", "auto", {**PLAIN, "block_k": 32}),
    ("plain, query blocks of 32", "auto", {**PLAIN, "block_q": 32}),
    ("plain, query blocks of 128", "auto", {**PLAIN, **ONE_MEAN, "block_q": 128}),
    ("plain, blocks of 128 x 128", "auto", {**PLAIN, **ONE_MEAN, "block_q": 128, "block_k": 128}),
    ("one dense step, density falls by 3.75", "auto", {**FALL, "density": [0.45, 0.12]}),
    ("one dense step, density falls by 2", "auto", {**FALL, "density": [0.35, 0.17]}),
    ("one dense step, density rises by 2", "auto", {**FALL, "density": [0.17, 0.35]}),
    ("union", "union", {}),
    ("pisa", "pisa", {}),
    ("svg1", "svg1", {}),
    ("psa", "psa", {}),
    ("subblock", "subblock", {}),
    ("streaming", "streaming", {}),
    ("llsa_lite", "llsa_lite", {}),
]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples/tiny_wan")
    parser.add_argument("--first", type=int, default=16, help="first prompt of prompts.txt")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--work", type=float, nargs="+", default=[0.3], help="work of the run over a dense run's")
    parser.add_argument("--warmup", type=float, default=0.1, help="of every row that does not say its own")
    parser.add_argument("--frames", type=int, default=65)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rows", nargs="+", help="labels; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--toy", action="store_true", help="1 prompt, 17 frames, 10 steps, three rows")
    parser.add_argument("--table", type=Path, help="only print the table of these records")
    parser.add_argument("--out", type=Path, default=Path("ablation.jsonl"))
    args = parser.parse_args()
    if args.toy:
        args.count, args.frames, args.steps, args.work = 1, 17, 10, [0.5]
        args.rows = args.rows or ["auto", "plain, means without correction", "union"]
    unknown = sorted(set(args.rows or ()) - {label for label, *_ in ROWS})
    if unknown:
        raise SystemExit(f"unknown rows {', '.join(unknown)}; known are {', '.join(label for label, *_ in ROWS)}")
    return args


def part(path: Path, worker: int) -> Path:
    return path.with_name(f"{path.stem}_{worker}{path.suffix}")


def psnr(clip: Any, reference: Any) -> float:
    error = np.mean((clip.astype(np.float32) - reference.astype(np.float32)) ** 2)
    return float(10 * np.log10(255**2 / max(float(error), 1e-9)))


def work(args: argparse.Namespace) -> None:
    """One worker: every ``workers``-th row."""
    torch.set_num_threads(max(1, torch.get_num_threads() // args.workers))
    lines = [line.strip() for line in (args.model / "prompts.txt").read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line][args.first : args.first + args.count]
    seeds = list(range(args.first, args.first + len(prompts)))
    call = {"height": args.size, "width": args.size, "num_frames": args.frames, "num_inference_steps": args.steps}
    call["guidance_scale"] = 4.0
    found = gpus()
    where = found[0]["name"] if args.device == "cuda" else "CPU"
    pipe = load(args.model, torch.device(args.device))
    dense = generate(pipe, prompts, seeds, **call).frames
    rows = [(density, *row) for density in args.work for row in ROWS if not args.rows or row[0] in args.rows]
    for density, label, method, options in rows[args.worker :: args.workers]:
        with dit_accel.enabled(pipe, method, **{"run_density": density, "warmup": args.warmup, **options}) as handle:
            clips = generate(pipe, prompts, seeds, **call).frames
            (status,) = handle.stats().values()
        values = [psnr(clip, reference) for clip, reference in zip(clips, dense, strict=True)]
        record = {
            "label": label,
            "method": method,
            "options": options,
            "asked": density,
            "work": status.density,
            "psnr": sum(values) / len(values),
            "each": values,
            "first": args.first,
            "call": call,
            "device": where,
            "versions": versions(),
        }
        append_record(part(args.out, args.worker), record)
        print(f"{label:45} {record['psnr']:6.2f} dB, worst {min(values):5.2f}, work {status.density:.3f}", flush=True)


def table(path: Path) -> str:
    """Markdown of all records beside ``path``."""
    files = sorted({path, *path.parent.glob(f"{path.stem}_*{path.suffix}")})
    records = [record for file in files if file.is_file() for record in read_records(file)]
    if not records:
        raise SystemExit(f"no records in {path} or beside it")
    lines = ["| variant | steps | work | PSNR, dB | worst prompt |", "|---|---|---|---|---|"]
    for record in sorted(records, key=lambda r: (-r["call"]["num_inference_steps"], -r["asked"], -r["psnr"])):
        told = f"{record['work']:.3f} | {record['psnr']:.2f} | {min(record['each']):.1f}"
        lines.append(f"| {record['label']} | {record['call']['num_inference_steps']} | {told} |")
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    if args.table:
        print(table(args.table))
    elif args.worker is not None:
        work(args)
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, *sys.argv[1:]]
        running = [subprocess.Popen([*command, "--worker", str(i)]) for i in range(args.workers)]
        failed = [process.wait() for process in running]
        print(table(args.out))
        if any(failed):
            raise SystemExit(f"workers ended with {failed}")


if __name__ == "__main__":
    main()
