"""Quality of the first methods at equal work: the first table of docs/results.md.

    python benchmarks/methods.py --out benchmarks/results/methods        # 16 prompts on a GPU, about three minutes
    python benchmarks/methods.py --toy                                   # the same, small, for a CPU

Each prompt is generated dense and with each method from the same noise, at the same work over the whole run: warm-up,
planning and pooled keys count. PSNR and SSIM are against the dense clip, on raw frames. The row `another seed` is dense
with other noise: what two unrelated clips score. Results are written after each sample; a run started again with the
same options goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "kernels", "patches", "eval")]

import dit_accel  # noqa: E402
from dit_accel.demo.pipeline import load  # noqa: E402
from dit_accel.env import gpus, versions  # noqa: E402
from dit_accel_eval.compare import Configuration, compare, summarise  # noqa: E402
from dit_accel_eval.files import read_records, write_json, write_text  # noqa: E402
from dit_accel_eval.generate import generate  # noqa: E402

METHODS = ("auto", "paro", "adaspa", "gna", "na", "dina")
FLOOR = "another seed"
CALIBRATION_PROMPTS = 2


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples/tiny_wan")
    parser.add_argument("--prompts", type=Path, help="one prompt a line (default: prompts.txt of the model)")
    parser.add_argument("--count", type=int, default=16, help="prompts to generate; the two after them calibrate paro")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--density", nargs="+", type=float, default=[0.5, 0.3], help="work over dense work of the run")
    parser.add_argument("--frames", type=int, default=65)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, help="prompts in one call (default: 4 on a GPU, 1 on a CPU)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no sample is begun")
    parser.add_argument("--toy", action="store_true", help="2 prompts, 17 frames, 6 steps, density 0.75")
    parser.add_argument("--out", type=Path, default=Path("methods-table"))
    args = parser.parse_args()
    if args.toy:
        args.count, args.frames, args.steps, args.density = 2, 17, 6, [0.75]
    if args.batch is None:
        args.batch = 4 if args.device == "cuda" else 1
    return args


def read_prompts(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Prompts to generate, and others to calibrate on."""
    path = args.prompts or args.model / "prompts.txt"
    if not path.is_file():
        raise SystemExit(f"no prompts at {path}; give --prompts FILE with one prompt a line")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    need = args.count + CALIBRATION_PROMPTS
    if len(lines) < need:
        raise SystemExit(f"{path} has {len(lines)} prompts, {need} are needed")
    return lines[: args.count], lines[args.count : need]


def digest(model: Path) -> str:
    """Short digest of the weights, so that samples of another model are not taken for this one's."""
    found = hashlib.sha256()
    for path in sorted(model.rglob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def configurations(
    pipe: Any, args: argparse.Namespace, prompts: list[str], call: dict[str, Any]
) -> list[Configuration]:
    """One configuration for each row; static methods are calibrated here."""
    rows = [Configuration(FLOOR, seed_offset=1000)]
    static = {m.name for m in dit_accel.methods() if m.static}
    for density in args.density:
        for name in args.methods:
            options: dict[str, Any] = {"run_density": density}
            if name in static:  # no warm-up and no planning: the density of its masks is that of the run
                began = time.perf_counter()
                plan = dit_accel.calibrate(
                    pipe, prompts, name, overrides={"density": density}, output_type="latent", **call
                )
                options = {"plan": plan}
                print(f"{name} {density:g}: calibrated in {time.perf_counter() - began:.1f} s on {', '.join(prompts)}")
            labels = {"method": name, "target": density}
            rows.append(Configuration(f"{name} {density:g}", name, options, labels=labels))
    return rows


def rehearse(pipe: Any, args: argparse.Namespace, rows: list[Configuration], prompt: str, call: dict[str, Any]) -> None:
    """Two steps of every row, so that no compilation is timed."""
    short = {**call, "num_inference_steps": 2}
    group, seeds = [prompt] * args.batch, list(range(args.batch))
    began = time.perf_counter()
    generate(pipe, group, seeds, **short)
    for row in rows:
        if row.method is None:
            continue
        # Two steps cannot reach every density over the run, and only the kernels matter here.
        with dit_accel.enabled(pipe, row.method, **{**row.options, "run_density": None}):
            generate(pipe, group, seeds, decode=False, **short)
    print(f"rehearsed in {time.perf_counter() - began:.1f} s")


def cells(row: dict[str, Any], dense_seconds: float) -> list[str]:
    if "error" in row:
        return [row["name"], row["error"], *[""] * 6]
    return [
        row["name"],
        f"{row['density']:.3f}",
        f"{row['psnr']:.2f} ± {row['psnr_std']:.2f}",
        f"{row['ssim']:.4f} ± {row['ssim_std']:.4f}",
        f"{row['flicker_difference']:+.5f} ± {row['flicker_difference_std']:.5f}",
        f"{row['seconds']:.3f}",
        f"{dense_seconds / row['seconds']:.2f}",
        f"{row['samples']}",
    ]


HEAD = ["method, density asked for", "density", "PSNR, dB", "SSIM", "flicker difference", "s", "speed-up", "samples"]


def write_tables(args: argparse.Namespace, names: list[str], records: list[dict[str, Any]], where: str) -> None:
    """JSON, Markdown and CSV of what is known so far."""
    rows = summarise(records, names)
    good = [r for r in records if "error" not in r]
    dense = sum(r["dense_seconds"] for r in good) / max(len(good), 1)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("limit", "out")}
    data = {"settings": settings, "device": where, "versions": versions(), "dense_seconds": dense, "rows": rows}
    write_json(args.out / "methods.json", data)
    table = [HEAD, *[cells(row, dense) for row in rows]]
    buffer = io.StringIO()
    csv.writer(buffer).writerows(table)
    write_text(args.out / "methods.csv", buffer.getvalue())
    lines = ["| " + " | ".join(row) + " |" for row in table]
    lines.insert(1, "|---" * len(HEAD) + "|")
    note = (
        f"{args.model.name}, {args.frames} frames, {args.steps} steps, guidance {args.guidance:g}, {where}, "
        f"batches of {args.batch}; mean ± standard deviation over prompts; "
        f"dense takes {dense:.3f} s a clip. Seconds are the denoising loop's share of one clip."
    )
    write_text(args.out / "methods.md", "\n".join([note, "", *lines]) + "\n")


def main() -> None:
    args = arguments()
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    prompts, others = read_prompts(args)
    pipe = load(args.model, torch.device(args.device))
    found = gpus()
    where = found[0]["name"] if args.device == "cuda" else "CPU"
    call = {
        "height": args.size,
        "width": args.size,
        "num_frames": args.frames,
        "guidance_scale": args.guidance,
        "num_inference_steps": args.steps,
    }
    rows = configurations(pipe, args, others, call)
    if args.device == "cuda":
        rehearse(pipe, args, rows, others[0], call)
    names = [row.name for row in rows]
    samples = args.out / "samples.jsonl"

    def on_record(record: dict[str, Any]) -> None:
        value = record.get("error") or f"{record['psnr']:.2f} dB at {record['density']:.3f}, {record['seconds']:.2f} s"
        print(f"{time.monotonic() - began:6.1f} s  {record['name']:14} {record['prompt'][:24]:24} {value}", flush=True)
        write_tables(args, names, [r for r in read_records(samples) if r["call"] == record["call"]], where)

    records = compare(
        pipe,
        prompts,
        rows,
        samples,
        seed=args.seed,
        batch=args.batch,
        tag=f"{digest(args.model)} on {where}",
        on_record=on_record,
        stop=lambda: time.monotonic() - began > args.limit,
        **call,
    )
    write_tables(args, names, records, where)
    print((args.out / "methods.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
