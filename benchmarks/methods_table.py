"""Every method at equal work: quality of clips and of attention, cost of planning. Makes docs/methods_table.md.

    python benchmarks/methods_table.py --workers 8 --out benchmarks/results/methods_table       # on a GPU
    python benchmarks/methods_table.py --toy                                                    # the same, small, on a CPU
    python benchmarks/methods_table.py --join benchmarks/results/methods_table                  # tables of what is there

Each prompt is generated dense and with every method from the same noise, at the same work over the whole run: warm-up,
planning, pooled and gathered keys count (``run_density``). The warm-up is the method's own where it fits, and is cut to two
fifths of the work otherwise. Metrics are against the dense clip, on raw frames; ``another seed`` is dense with other noise:
what two unrelated clips score. Rows are spread over worker processes, and all prompts of a row go through the model in
batches; each worker appends its records to a file of its own and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "kernels", "patches", "eval", "benchmarks")]

from _attention_probe import probing  # noqa: E402

import dit_accel  # noqa: E402
from dit_accel.demo.pipeline import load  # noqa: E402
from dit_accel.env import gpus, versions  # noqa: E402
from dit_accel.learned import missing_scorer  # noqa: E402
from dit_accel.presets import get_method  # noqa: E402
from dit_accel.static_plan import StaticPlan  # noqa: E402
from dit_accel_eval.files import append_record, read_records, write_json, write_text  # noqa: E402
from dit_accel_eval.generate import generate  # noqa: E402
from dit_accel_eval.metrics import evaluate_pair  # noqa: E402

FLOOR = "another seed"
PROBED = 2  # prompts on which the attention of each method is measured, too
CALIBRATION = 2
SHARE = 0.4  # of the work that a warm-up may take


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples/tiny_wan")
    parser.add_argument("--prompts", type=Path, help="one prompt a line (default: prompts.txt of the model)")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--first", type=int, default=0, help="first prompt")
    parser.add_argument("--methods", nargs="+", help="default: every method that ships")
    parser.add_argument("--density", nargs="+", type=float, default=[0.5, 0.3, 0.2, 0.1])
    parser.add_argument("--frames", type=int, default=65)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--metrics", nargs="+", default=["psnr", "ssim", "lpips_alex", "flicker_difference"])
    parser.add_argument("--options", default="{}", help="JSON: further options of every method")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no sample is begun")
    parser.add_argument("--batch", type=int, default=16, help="prompts in one call")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--toy", action="store_true", help="1 prompt, 17 frames, 6 steps, density 0.6")
    parser.add_argument("--join", type=Path, help="only make the tables of this folder")
    parser.add_argument("--out", type=Path, default=Path("methods-table"))
    args = parser.parse_args()
    if args.toy:
        args.count, args.frames, args.steps, args.density = 1, 17, 6, [0.6]
    if args.methods is None:
        args.methods = [m.name for m in dit_accel.methods() if not m.is_dense and missing_scorer(m) is None]
    return args


def call_of(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "height": args.size,
        "width": args.size,
        "num_frames": args.frames,
        "guidance_scale": args.guidance,
        "num_inference_steps": args.steps,
    }


def read_prompts(args: argparse.Namespace) -> list[str]:
    path = args.prompts or args.model / "prompts.txt"
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < args.first + args.count:
        raise SystemExit(f"{path} has {len(lines)} prompts, {args.first + args.count} are needed")
    return lines


def options_of(name: str, density: float, args: argparse.Namespace) -> dict[str, Any]:
    """Options of a method at some work: its own warm-up, or what two fifths of the work allow."""
    method = get_method(name)
    allowed = math.floor(SHARE * density * args.steps + 1e-6) / args.steps
    options: dict[str, Any] = {"run_density": density, **json.loads(args.options)}
    if method.warmup > allowed:
        options["warmup"] = allowed
    return options


def plan_path(args: argparse.Namespace, name: str, density: float) -> Path:
    return args.out / f"plan_{name}_{density:g}.safetensors"


def calibrate(args: argparse.Namespace, prompts: list[str]) -> None:
    """Plans of the static methods, made once, on the last prompts of the file."""
    static = [name for name in args.methods if get_method(name).static]
    if not static:
        return
    pipe = load(args.model, torch.device(args.device))
    for name in static:
        for density in args.density:
            path = plan_path(args, name, density)
            if path.is_file():
                continue
            plans = dit_accel.calibrate(
                pipe,
                prompts[-CALIBRATION:],
                name,
                overrides={"density": density},
                output_type="latent",
                **call_of(args),
            )
            plan = plans if isinstance(plans, StaticPlan) else next(iter(plans.values()))
            plan.save(path)


def one_run(
    pipe: Any, name: str, density: float, prompts: list[str], seeds: list[int], args: argparse.Namespace
) -> tuple[Any, dict[str, Any]]:
    """Clips of a method, and what the engine counted."""
    options = options_of(name, density, args)
    if get_method(name).static:
        options = {"plan": StaticPlan.load(plan_path(args, name, density))}
    with dit_accel.enabled(pipe, name, **options) as handle:
        clips = generate(pipe, prompts, seeds, **call_of(args))
        (status,) = handle.stats().values()
    record = {
        "density": status.density,
        "sparse_density": status.sparse_density,
        "plan_work": status.plan_work,
        "plan_ms": status.plan_ms,
        "plans": status.plans,
        "notes": status.notes,
        "seconds": clips.denoise_seconds / len(prompts),
        "warmup": options.get("warmup", get_method(name).warmup),
    }
    return clips.frames, record


def probed(
    pipe: Any, name: str, density: float, prompts: list[str], seeds: list[int], args: argparse.Namespace
) -> dict[str, float]:
    """Attention-level error over a run of its own, so that it is in nobody's time."""
    options = options_of(name, density, args)
    if get_method(name).static:
        options = {"plan": StaticPlan.load(plan_path(args, name, density))}
    with probing() as probe, dit_accel.enabled(pipe, name, **options):
        generate(pipe, prompts, seeds, decode=False, **call_of(args))
    return probe.summary()


def work(args: argparse.Namespace) -> None:
    """One worker: its rows, each over all prompts."""
    began = time.monotonic()
    prompts = read_prompts(args)[args.first : args.first + args.count]
    seeds = list(range(args.first, args.first + args.count))
    pipe = load(args.model, torch.device(args.device))
    path = args.out / f"samples_{args.worker}.jsonl"
    done = {r["name"] for r in read_records(path)}
    rows = [(FLOOR, None), *((name, d) for d in args.density for name in args.methods)]
    mine = [(n, d) for n, d in rows[args.worker :: args.workers] if title(n, d) not in done]
    dense: dict[int, Any] = {}
    for name, density in mine:
        if time.monotonic() - began > args.limit:
            break
        records: list[dict[str, Any]] = []
        for first in range(0, len(prompts), args.batch):
            group, numbers = prompts[first : first + args.batch], seeds[first : first + args.batch]
            if first not in dense:
                dense[first] = generate(pipe, group, numbers, **call_of(args)).frames
            records += row(pipe, name, density, group, numbers, dense[first], args)
        if density is not None and "error" not in records[0]:
            records[0] |= probed(pipe, name, density, prompts[:PROBED], seeds[:PROBED], args)
        for record in records:
            append_record(path, record)
        told = records[0].get("error") or f"{mean(records, 'psnr'):.2f} dB at {records[0]['density']:.3f}"
        print(f"{time.monotonic() - began:6.1f} s  {title(name, density):20} {told[:90]}", flush=True)


def row(
    pipe: Any,
    name: str,
    density: float | None,
    prompts: list[str],
    seeds: list[int],
    dense: Any,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Records of one row for one batch of prompts."""
    base = [{"name": title(name, density), "method": name, "target": density, "prompt": p} for p in prompts]
    try:
        if density is None:
            frames = generate(pipe, prompts, [seed + 1000 for seed in seeds], **call_of(args)).frames
            made: dict[str, Any] = {"density": 1.0}
        else:
            frames, made = one_run(pipe, name, density, prompts, seeds, args)
    except ValueError as error:
        return [{**record, "error": str(error)} for record in base]
    return [
        {**record, **evaluate_pair(clip, reference, args.metrics, device=args.device), **made}
        for record, clip, reference in zip(base, frames, dense, strict=True)
    ]


def rehearse(args: argparse.Namespace) -> None:
    """Compile the kernels of this worker's share of the methods, so that the workers do not all compile the same."""
    pipe = load(args.model, torch.device(args.device))
    short = {**call_of(args), "num_inference_steps": 4, "num_frames": min(args.frames, 17)}
    for name in args.methods[args.worker :: args.workers]:
        if get_method(name).static:
            continue
        with dit_accel.enabled(pipe, name, density=0.5, warmup=0.25):
            generate(pipe, ["a ball"], [0], decode=False, **short)


def title(name: str, density: float | None) -> str:
    return name if density is None else f"{name} {density:g}"


def mean(records: list[dict[str, Any]], key: str) -> float | None:
    values = [float(r[key]) for r in records if r.get(key) is not None]
    return sum(values) / len(values) if values else None


COLUMNS = {
    "density": ("density", ".3f"),
    "psnr": ("PSNR, dB", ".2f"),
    "worst": ("worst", ".1f"),
    "ssim": ("SSIM", ".4f"),
    "lpips_alex": ("LPIPS", ".4f"),
    "flicker_difference": ("flicker difference", "+.5f"),
    "attention_rel_l1": ("attention rel-L1", ".3f"),
    "recalled_mass": ("recalled mass", ".3f"),
    "plan_work": ("plan work", ".3f"),
    "plan_ms": ("plan ms", ".0f"),
    "samples": ("samples", "d"),
}


def join(folder: Path) -> None:
    """Tables, JSON and plot of every record in a folder."""
    records = [r for path in sorted(folder.glob("samples_*.jsonl")) for r in read_records(path)]
    if not records:
        raise SystemExit(f"{folder} holds no samples_*.jsonl with records")
    rows = []
    for name in dict.fromkeys(r["name"] for r in records):
        found = [r for r in records if r["name"] == name]
        good = [r for r in found if "error" not in r]
        row: dict[str, Any] = {"name": name, "method": found[0]["method"], "target": found[0]["target"]}
        if good:
            row |= {key: mean(good, key) for key in COLUMNS if key not in ("samples", "worst")}
            row |= {"samples": len(good), "worst": min(r["psnr"] for r in good), "warmup": mean(good, "warmup")}
        else:
            row["error"] = found[0]["error"]
        rows.append(row)
    settings = json.loads((folder / "settings.json").read_text()) if (folder / "settings.json").is_file() else {}
    write_json(folder / "methods_table.json", {**settings, "rows": rows})
    write_text(folder / "methods_table.md", markdown(rows))
    plot(rows, folder / "pareto.svg")


def markdown(rows: list[dict[str, Any]]) -> str:
    parts = []
    for target in dict.fromkeys(r["target"] for r in rows):
        here = [r for r in rows if r["target"] == target]
        here.sort(key=lambda r: -(r.get("psnr") or -1.0))
        head = ["method", *(label for label, _ in COLUMNS.values())]
        lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for row in here:
            cells = [format(row[k], spec) if row.get(k) is not None else "" for k, (_, spec) in COLUMNS.items()]
            if "error" in row:
                cells = [row["error"], *[""] * (len(COLUMNS) - 1)]
            lines.append("| " + " | ".join([f"`{row['method']}`" if target else row["method"], *cells]) + " |")
        heading = f"### Work {target:g} of dense" if target is not None else "### Floor"
        parts.append("\n".join([heading, "", *lines]))
    return "\n\n".join(parts) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """PSNR against measured work, one line a method."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 7))
    methods = sorted({r["method"] for r in rows if r["target"] is not None and "error" not in r})
    best = {m: max(r["psnr"] for r in rows if r["method"] == m and "error" not in r) for m in methods}
    colours = plt.get_cmap("tab20")
    for i, method in enumerate(sorted(methods, key=lambda m: -best[m])):
        mine = sorted((r["density"], r["psnr"]) for r in rows if r["method"] == method and "error" not in r)
        style = (
            {"linewidth": 2.6, "color": "black"} if method == "auto" else {"linewidth": 1.2, "color": colours(i % 20)}
        )
        axes.plot(*zip(*mine), marker="os^Dv"[i % 5], markersize=4, label=method, **style)
    floor = [r["psnr"] for r in rows if r["target"] is None]
    if floor:
        axes.axhline(floor[0], color="grey", linestyle=":", label=FLOOR)
    axes.set_xlabel("work over dense, warm-up and planning included")
    axes.set_ylabel("PSNR against dense, dB")
    axes.legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(alpha=0.3)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    args = arguments()
    if args.join:
        join(args.join)
        print((args.join / "methods_table.md").read_text(encoding="utf-8"))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if args.worker is not None:
        torch.set_num_threads(1)
        rehearse(args) if args.rehearse else work(args)
        return
    found = gpus()
    where = found[0]["name"] if args.device == "cuda" else "CPU"
    settings = {
        k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("limit", "out", "join")
    }
    write_json(args.out / "settings.json", {"settings": settings, "device": where, "versions": versions()})
    began = time.monotonic()
    calibrate(args, read_prompts(args))
    command = [sys.executable, __file__, *sys.argv[1:]]
    if args.device == "cuda":
        compilers = ["--rehearse", "--workers", "14"]  # compiling is the host's work
        starting = [subprocess.Popen([*command, *compilers, "--worker", str(i)]) for i in range(14)]
        if any(process.wait() for process in starting):
            raise SystemExit("a method failed in the rehearsal")
        print(f"rehearsed in {time.monotonic() - began:.0f} s", flush=True)
    left = args.limit - (time.monotonic() - began)
    more = [] if math.isinf(left) else ["--limit", f"{left:.0f}"]
    running = [subprocess.Popen([*command, "--worker", str(i), *more]) for i in range(args.workers)]
    failed = [process.wait() for process in running]
    join(args.out)
    print((args.out / "methods_table.md").read_text(encoding="utf-8"))
    if any(failed):
        raise SystemExit(f"workers ended with {failed}")


if __name__ == "__main__":
    main()
