"""Whether a target is met: asked for 30, 35 and 40 dB, what do prompts get that no calibration has seen?

    python benchmarks/targets.py --workers 4 --out benchmarks/results/targets  # a GPU: 32 prompts to calibrate, 16 to test
    python benchmarks/targets.py --toy                                         # the same, small, for a CPU

Two profiles are calibrated: `error` keeps an error of attention that is measured anew whenever a plan is made, `density`
holds one density for each head. Then the first prompts of the model's list are generated dense and with each profile for
each target, from the same noise. None of them is among those to calibrate on, which were drawn at random from everything
that the model was taught (`random.Random(0).sample` of `concepts.py` without the model's own list). PSNR is against the
dense clip, each frame on [0, 1], mean over frames; the work is that of the whole run, warm-up, planning and probing
included. The work folder keeps what is done, so that a run that was stopped goes on. Workers share the prompts; the curve
of `error` is the mean of theirs, densities of heads are calibrated by one.

`--write-stock` writes the curve of `error` to dit_accel/targets/stock.json, from which `target_psnr` without a profile
takes its error; `--write-profile FOLDER` writes the profile of `--ship`, to be shared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "kernels", "patches", "eval")]

import dit_accel  # noqa: E402
from dit_accel.calibration.folder import WorkFolder  # noqa: E402
from dit_accel.calibration.quality import pictures, psnr  # noqa: E402
from dit_accel.demo.pipeline import load  # noqa: E402
from dit_accel.env import gpus, versions  # noqa: E402
from dit_accel.profiles import Profile  # noqa: E402
from dit_accel.targets.quality import QualityCurve, QualityPoint  # noqa: E402
from dit_accel_eval.files import write_json, write_text  # noqa: E402

PROMPTS = ROOT / "benchmarks/targets_prompts.txt"
STOCK = ROOT / "dit_accel/targets/stock.json"
ERRORS = (0.2, 0.1, 0.05, 0.025, 0.0125)
WITHIN = 1.5
SHIPPED = 35.0  # dB


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples/tiny_wan")
    parser.add_argument("--method", default="auto")
    parser.add_argument("--targets", nargs="+", type=float, default=[30.0, 35.0, 40.0], help="dB")
    parser.add_argument("--controls", nargs="+", default=["error", "density"], choices=["error", "density"])
    parser.add_argument("--count", type=int, default=16, help="prompts to test, the first of prompts.txt")
    parser.add_argument("--calibrate", type=int, default=32, help="prompts to calibrate on, the first of --prompts")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="one a line, to calibrate on")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--keep", action="store_true", help="test with the profiles that an earlier run left in --out")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--errors", nargs="+", type=float, default=list(ERRORS), help="errors whose PSNR is measured")
    parser.add_argument("--frames", type=int, default=65)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="1 prompt each, 9 frames of 64 x 64, 4 steps, one target")
    parser.add_argument("--out", type=Path, default=Path("targets"))
    parser.add_argument("--write-stock", action="store_true")
    parser.add_argument("--write-profile", type=Path)
    parser.add_argument("--ship", default="density", choices=["error", "density"])
    args = parser.parse_args()
    if args.toy:
        args.count, args.calibrate, args.frames, args.steps, args.size = 1, 1, 9, 4, 64
        args.errors, args.targets = [0.3, 0.05], args.targets[:1]
    return args


def calibrated(pipe: Any, args: argparse.Namespace, prompts: list[str], control: str, call: dict[str, Any]) -> Profile:
    """A profile with a curve through all errors."""
    began = time.perf_counter()
    *further, last = args.errors
    part = args.part or 0
    profile = dit_accel.calibrate(
        pipe,
        prompts,
        args.method,
        target=f"error:{last:g}",
        control=control,
        errors=further,
        folder=args.out / f"work_{control}_{part}",
        seed=10_000 + 1_000 * part,
        **call,
    )
    assert isinstance(profile, Profile)
    print(f"{control}: calibrated on {len(prompts)} prompts in {time.perf_counter() - began:.0f} s", flush=True)
    return dataclasses.replace(profile, name=f"{args.model.name}, {args.method}, {control}")


def joined(profiles: list[Profile], counts: list[int]) -> Profile:
    """One profile whose curve is the mean of all, by the prompts of each."""
    curves = [profile.curve for profile in profiles]
    total = sum(counts)

    def mean(index: int, name: str) -> float:
        return sum(n * float(getattr(c.points[index], name)) for c, n in zip(curves, counts, strict=True) if c) / total

    first = curves[0]
    assert first is not None
    points = tuple(
        QualityPoint(point.error, mean(index, "psnr"), mean(index, "density"))
        for index, point in enumerate(first.points)
    )
    source = first.source.replace(f"{counts[0]} prompts", f"{total} prompts")
    return dataclasses.replace(profiles[0], curve=QualityCurve(points, source))


def sample(pipe: Any, prompt: str, seed: int, call: dict[str, Any]) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return pictures(pipe(prompt=prompt, generator=generator, output_type="np", **call))


def measure(
    pipe: Any,
    args: argparse.Namespace,
    profiles: dict[str, Profile],
    prompts: list[str],
    call: dict[str, Any],
    share: slice = slice(None),
) -> WorkFolder:
    """PSNR and work of each prompt of a share, a file for each."""
    settings = {"call": call, "method": args.method, "profiles": {c: repr(p.curve) for c, p in profiles.items()}}
    work = WorkFolder(args.out / "test", settings)
    for index, prompt in list(enumerate(prompts))[share]:
        dense = sample(pipe, prompt, index, call)
        for control, profile in profiles.items():
            for target in args.targets:
                if work.result(f"{control}-{target:g}-{index}") is not None:
                    continue
                with dit_accel.enabled(pipe, profile=profile, target_psnr=target, min_tokens=0) as handle:
                    made = sample(pipe, prompt, index, call)
                    density = next(iter(handle.stats().values())).density
                work.put_result(f"{control}-{target:g}-{index}", {"psnr": psnr(made, dense), "density": density})
    return work


def in_workers(args: argparse.Namespace) -> None:
    """This command once for each worker, which takes its share."""
    command = [sys.executable, __file__, *sys.argv[1:]]
    running = [subprocess.Popen([*command, "--part", str(part)]) for part in range(args.workers)]
    failed = [process.wait() for process in running]
    if any(failed):
        raise SystemExit(f"workers ended with {failed}")


def lines(path: Path, count: int) -> list[str]:
    """The first prompts of a file."""
    found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(found) < count:
        raise SystemExit(f"{path} has {len(found)} prompts, {count} are needed")
    return found[:count]


def table(rows: list[dict[str, Any]]) -> str:
    head = "| control | asked, dB | mean, dB | off by | lowest | highest | work | error kept | within 1.5 dB |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['control']} | {row['target']:g} | {row['psnr']:.2f} | {row['psnr'] - row['target']:+.2f} | "
            f"{row['lowest']:.2f} | {row['highest']:.2f} | {row['density']:.3f} | {row['error']:.4f} | "
            f"{'yes' if row['met'] else 'no'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    tested, seen = lines(args.model / "prompts.txt", args.count), lines(args.prompts, args.calibrate)
    if both := set(tested) & set(seen):
        raise SystemExit(f"{sorted(both)} would be calibrated on and tested")
    pipe = load(args.model, torch.device(args.device))
    call = {
        "height": args.size,
        "width": args.size,
        "num_frames": args.frames,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
    }
    folder = args.out / "profiles"
    if args.part is not None:
        share = slice(args.part, None, args.workers)
        if (folder / "ready").is_file():
            measure(pipe, args, {c: Profile.load(folder / c) for c in args.controls}, tested, call, share)
        elif "error" in args.controls:
            calibrated(pipe, args, seen[share], "error", call).save(folder / f"error_{args.part}")
        return
    profiles = {c: Profile.load(folder / c) for c in args.controls} if args.keep else {}
    if not args.keep:
        shutil.rmtree(folder, ignore_errors=True)
        if args.workers > 1:
            in_workers(args)
    for control in [] if args.keep else args.controls:
        if control == "error" and args.workers > 1:
            parts = [Profile.load(folder / f"error_{part}") for part in range(args.workers)]
            profiles[control] = joined(parts, [len(seen[part :: args.workers]) for part in range(args.workers)])
        else:
            profiles[control] = calibrated(pipe, args, seen, control, call)
        profiles[control].save(folder / control)
        curve = profiles[control].curve
        for point in curve.points if curve is not None else ():
            print(f"  error {point.error:<8g} {point.psnr:6.2f} dB  density {point.density:.3f}", flush=True)
    if args.workers > 1:
        write_text(folder / "ready", "")
        in_workers(args)
        profiles = {control: Profile.load(folder / control) for control in args.controls}
    work = measure(pipe, args, profiles, tested, call, slice(0, 0) if args.workers > 1 else slice(None))
    rows: list[dict[str, Any]] = []
    for control, profile in profiles.items():
        assert profile.curve is not None
        for target in args.targets:
            kept = [work.result(f"{control}-{target:g}-{index}") for index in range(len(tested))]
            found = [row for row in kept if row is not None]
            assert len(found) == len(tested)
            values = [row["psnr"] for row in found]
            mean = statistics.fmean(values)
            row = {"control": control, "target": target, "psnr": mean, "lowest": min(values), "highest": max(values)}
            row |= {"density": statistics.fmean(r["density"] for r in found), "met": abs(mean - target) <= WITHIN}
            rows.append({**row, "error": profile.curve.error_for(target), "samples": found})
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    record = {"rows": rows, "call": call, "method": args.method, "tested": tested, "calibrated_on": seen}
    curves = {c: p.curve.to_dict() for c, p in profiles.items() if p.curve is not None}
    write_json(args.out / "targets.json", {**record, "curves": curves, "versions": versions(), "gpus": gpus()})
    write_text(args.out / "targets.md", table(rows))
    print(table(rows))
    if args.write_stock:
        curve = profiles["error"].curve
        assert curve is not None
        model = type(pipe.transformer).__name__
        told = dataclasses.replace(curve, source=f"{args.model.name}, {curve.source}")
        write_text(STOCK, json.dumps({model: told.to_dict()}, indent=2) + "\n")
        print(f"wrote {STOCK}")
    if args.write_profile is not None:
        from dit_accel.profiles.retarget import retarget
        from dit_accel.targets import parse_target

        (row,) = (row for row in rows if row["control"] == args.ship and row["target"] == SHIPPED)
        gave = {"prompts": tested, **{key: row[key] for key in ("error", "psnr", "density")}}
        shipped = retarget(profiles[args.ship], parse_target(f"psnr:{SHIPPED:g}"))
        shipped = dataclasses.replace(shipped, measured=gave)  # on prompts that it has not seen
        print(f"wrote {shipped.save(args.write_profile)}")


if __name__ == "__main__":
    main()
