"""Every method at equal work: quality of clips or pictures and of attention, cost of planning. Makes docs/methods_table.md.

    python benchmarks/methods_table.py --workers 8 --out benchmarks/results/methods_table       # on a GPU
    python benchmarks/methods_table.py --toy                                                    # the same, small, on a CPU
    python benchmarks/methods_table.py --join benchmarks/results/methods_table --page docs/methods_table.md    # the page
    python benchmarks/methods_table.py --model tiny_flux --workers 6       # pictures, for docs/methods_table_image.md

Each prompt is generated dense and with every method from the same noise, at the same work over the whole run: warm-up,
planning, pooled and gathered keys count (``run_density``). The warm-up is the method's own where it fits, and is cut to two
fifths of the work otherwise. Metrics are against the dense clip, on raw frames; ``another seed`` is dense with other noise:
what two unrelated clips score. All prompts of a row go through the model in batches. Worker processes take one row after
another from a common list; rows that a file of the folder holds are left out, so that a run goes on where the last stopped.
``--methods`` takes presets and the rows that ``VARIANTS`` of ``_table_models.py`` names, such as ``"sol, bricks"``.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "kernels", "patches", "eval", "benchmarks")]

from _attention_probe import probing  # noqa: E402
from _table_models import call_of, fill, is_image, lacking, model_folder, open_model, preset_of  # noqa: E402
from _table_pages import join  # noqa: E402
from _table_queue import RowQueue, read_samples  # noqa: E402
from _table_rows import FLOOR  # noqa: E402

import dit_accel  # noqa: E402
from dit_accel.env import gpus, versions  # noqa: E402
from dit_accel.presets import get_method  # noqa: E402
from dit_accel.static_plan import StaticPlan  # noqa: E402
from dit_accel_eval.files import append_record, write_json  # noqa: E402
from dit_accel_eval.generate import generate  # noqa: E402
from dit_accel_eval.metrics import evaluate_pair  # noqa: E402

PROBED = 2  # prompts on which the attention of each method is measured, too
CALIBRATION = 2
SHARE = 0.4  # of the work that a warm-up may take
_AGAIN = 10.0  # seconds until a row that found no memory is tried again

T = TypeVar("T")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_folder, default=ROOT / "examples/tiny_wan", help="folder, or an example")
    parser.add_argument("--prompts", type=Path, help="one prompt a line (default: prompts.txt of the model)")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--first", type=int, default=0, help="first prompt")
    parser.add_argument(
        "--methods", nargs="+", help="default: every method that ships; or rows of VARIANTS in _table_models.py"
    )
    parser.add_argument("--density", nargs="+", type=float, help="default: 0.5 0.3 0.2, and 0.1 for video")
    parser.add_argument("--frames", type=int, help="of a clip, default: 65")
    parser.add_argument("--steps", type=int, help="default: 30 for video, 28 for pictures")
    parser.add_argument("--guidance", type=float, help="of video, default: 4")
    parser.add_argument("--text", type=int, default=128, help="of pictures: positions of text, max_sequence_length")
    parser.add_argument("--size", type=int, help="default: 128 for video, 256 for pictures")
    parser.add_argument("--metrics", nargs="+", help="default: PSNR, SSIM, LPIPS, and flicker for video")
    parser.add_argument("--options", default="{}", help="JSON: further options of every method")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no sample is begun")
    parser.add_argument("--batch", type=int, default=16, help="prompts in one call")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rehearsed", nargs="*", default=[], help="methods whose kernels Triton's cache has already")
    parser.add_argument("--no-probe", action="store_true", help="leave out error and recall of attention, a run each")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--toy", action="store_true", help="1 prompt, 17 frames or 128 x 128, 6 steps, density 0.6")
    parser.add_argument("--join", type=Path, help="only make the tables of this folder")
    parser.add_argument("--page", type=Path, help="with --join: the page whose generated parts are renewed")
    parser.add_argument("--out", type=Path, help="default: methods-table, for pictures in benchmarks/results")
    args = parser.parse_args()
    fill(args)
    return args


def read_prompts(args: argparse.Namespace) -> list[str]:
    path = args.prompts or args.model / "prompts.txt"
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < args.first + args.count:
        raise SystemExit(f"{path} has {len(lines)} prompts, {args.first + args.count} are needed")
    return lines


def warmup_of(name: str, density: float, args: argparse.Namespace) -> float:
    """Warm-up of a method at some work: its own, or what two fifths of the work allow."""
    allowed = math.floor(SHARE * density * args.steps + 1e-6) / args.steps
    method = get_method(preset_of(name)[0])
    if method.pictures and is_image(args.model):
        method = method.for_pictures
    return min(method.warmup, allowed)


def options_of(pipe: Any, name: str, density: float, args: argparse.Namespace) -> dict[str, Any]:
    """Options of a method at some work."""
    preset, changes = preset_of(name)
    if get_method(preset).static:
        return {"plan": calibrate(pipe, name, density, read_prompts(args), args)}
    return {"run_density": density, "warmup": warmup_of(name, density, args), **changes, **json.loads(args.options)}


def plan_path(args: argparse.Namespace, name: str, density: float) -> Path:
    return args.out / f"plan_{name}_{density:g}.safetensors"


def calibrate(pipe: Any, name: str, density: float, prompts: list[str], args: argparse.Namespace) -> StaticPlan:
    """The plan of a static method, made on the last prompts of the file where no earlier run has left it."""
    path = plan_path(args, name, density)
    if not path.is_file():
        dense = math.ceil(warmup_of(name, density, args) * args.steps - 1e-6) / args.steps
        overrides = {"density": (density - dense) / (1 - dense), "warmup": dense}
        plans = dit_accel.calibrate(
            pipe, prompts[-CALIBRATION:], name, overrides=overrides, output_type="latent", **call_of(args)
        )
        (plans if isinstance(plans, StaticPlan) else next(iter(plans.values()))).save(path)
    return StaticPlan.load(path)


def one_run(
    pipe: Any, name: str, density: float, prompts: list[str], seeds: list[int], args: argparse.Namespace
) -> tuple[Any, dict[str, Any]]:
    """Clips of a method, and what the engine counted."""
    options = options_of(pipe, name, density, args)
    with dit_accel.enabled(pipe, preset_of(name)[0], **options) as handle:
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
        "peak_gib": None if clips.peak_bytes is None else clips.peak_bytes / 2**30,
        "warmup": warmup_of(name, density, args),
    }
    return clips.frames, record


def probed(
    pipe: Any, name: str, density: float, prompts: list[str], seeds: list[int], args: argparse.Namespace
) -> dict[str, float]:
    """Attention-level error over a run of its own, so that it is in nobody's time."""
    options = options_of(pipe, name, density, args)
    with probing() as probe, dit_accel.enabled(pipe, preset_of(name)[0], **options):
        generate(pipe, prompts, seeds, decode=False, **call_of(args))
    return probe.summary()


def work(args: argparse.Namespace) -> None:
    """One worker: takes rows that nobody has begun, each over all prompts."""
    began = time.monotonic()
    prompts = read_prompts(args)[args.first : args.first + args.count]
    seeds = list(range(args.first, args.first + args.count))
    pipe = open_model(args)
    queue = RowQueue(args.out, f"worker {args.worker}")
    done = finished(args.out, len(prompts))
    groups = [slice(i, i + args.batch) for i in range(0, len(prompts), args.batch)]
    for name, density in rows_of(args):
        if time.monotonic() - began > args.limit:
            break
        if title(name, density) in done or not queue.take(title(name, density)):
            continue
        reason = lacking(name, args)
        if reason is None and density is not None and name not in args.rehearsed and queue.take(f"rehearsal of {name}"):
            rehearse(pipe, name, prompts[groups[0]], seeds[groups[0]], args)
        records: list[dict[str, Any]] = []
        if reason is not None:
            records = [{"name": title(name, density), "method": name, "target": density, "error": reason, "prompt": ""}]
        for group in groups if reason is None else []:
            dense = queue.shared(
                f"dense_{args.first + group.start}_{args.batch}",
                lambda one=group: generate(pipe, prompts[one], seeds[one], **call_of(args)).frames,
            )
            made = partial(row, pipe, name, density, prompts[group], seeds[group], dense, args)
            records += patiently(made)
        if density is not None and not args.no_probe and "error" not in records[0]:
            records[0] |= patiently(partial(probed, pipe, name, density, prompts[:PROBED], seeds[:PROBED], args))
        for record in records:
            append_record(args.out / f"samples_{args.worker}.jsonl", record)
        if args.device == "cuda":
            torch.cuda.empty_cache()  # the other workers share the memory
        told = records[0].get("error") or f"{mean(records, 'psnr'):.2f} dB at {records[0]['density']:.3f}"
        print(f"{time.monotonic() - began:6.1f} s  {title(name, density):20} {told[:90]}", flush=True)


def patiently(make: Callable[[], T]) -> T:
    """Do something again where the other workers had taken the memory."""
    try:
        return make()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        time.sleep(_AGAIN)
    return make()


def rows_of(args: argparse.Namespace) -> list[tuple[str, float | None]]:
    """All rows, in the order in which they are begun."""
    return [(FLOOR, None), *((name, d) for d in args.density for name in args.methods)]


def finished(folder: Path, prompts: int) -> set[str]:
    """Rows that have a record for each prompt, or could not be made."""
    records = read_samples(folder)
    count = Counter(r["name"] for r in records)
    return {r["name"] for r in records if "error" in r or count[r["name"]] >= prompts}


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


def rehearse(pipe: Any, name: str, prompts: list[str], seeds: list[int], args: argparse.Namespace) -> None:
    """Compile the kernels of a method at the shapes of its rows, so that compiling is in nobody's time."""
    preset, changes = preset_of(name)
    if get_method(preset).static:
        return
    with dit_accel.enabled(pipe, preset, **{"density": 0.5, "warmup": 0.25, **changes}):
        generate(pipe, prompts, seeds, decode=False, **{**call_of(args), "num_inference_steps": 4})


def title(name: str, density: float | None) -> str:
    return name if density is None else f"{name} {density:g}"


def mean(records: list[dict[str, Any]], key: str) -> float:
    return sum(float(r[key]) for r in records) / len(records)


def note_run(args: argparse.Namespace) -> None:
    """Add this run's settings, device and versions to those of the runs before it."""
    path = args.out / "settings.json"
    left_out = ("limit", "out", "join", "page")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in left_out}
    where = gpus()[0]["name"] if args.device == "cuda" else "CPU"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    write_json(path, {"runs": [*runs, {"settings": settings, "device": where, "versions": versions()}]})


def main() -> None:
    args = arguments()
    if args.join:
        join(args.join, args.page)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if args.worker is not None:
        torch.set_num_threads(1)
        work(args)
        return
    note_run(args)
    RowQueue(args.out, "main").clear()
    more = [] if math.isinf(args.limit) else ["--limit", f"{args.limit:.0f}"]
    command = [sys.executable, __file__, *sys.argv[1:]]
    running = [subprocess.Popen([*command, "--worker", str(i), *more]) for i in range(args.workers)]
    failed = [process.wait() for process in running]
    join(args.out)
    print((args.out / "methods_table.md").read_text(encoding="utf-8"))
    if any(failed):
        raise SystemExit(f"workers ended with {failed}")


if __name__ == "__main__":
    main()
