"""Whether a target is met: asked for 30, 35 and 40 dB, what do prompts get that no calibration has seen?

    python benchmarks/targets.py --out benchmarks/results/targets        # a GPU: 8 prompts to calibrate, 16 to test
    python benchmarks/targets.py --toy                                   # the same, small, for a CPU

Two profiles are calibrated on the last prompts of the list: `error` keeps an error of attention that is measured anew
whenever a plan is made, `density` holds one density for each head. Then the first prompts of the list are generated dense
and with each profile for each target, from the same noise. PSNR is against the dense clip, each frame on [0, 1], mean over
frames; the work is that of the whole run, warm-up, planning and probing included. The work folder keeps what is done, so
that a run that was stopped goes on.

`--write-stock` writes the curve of `error` to dit_accel/targets/stock.json, from which `target_psnr` without a profile
takes its error; `--write-profile FOLDER` writes the profile of `--ship`, to be shared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
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
from dit_accel_eval.files import write_json, write_text  # noqa: E402

STOCK = ROOT / "dit_accel/targets/stock.json"
ERRORS = (0.2, 0.1, 0.05, 0.025, 0.0125)
WITHIN = 1.5


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples/tiny_wan")
    parser.add_argument("--method", default="auto")
    parser.add_argument("--targets", nargs="+", type=float, default=[30.0, 35.0, 40.0], help="dB")
    parser.add_argument("--controls", nargs="+", default=["error", "density"], choices=["error", "density"])
    parser.add_argument("--count", type=int, default=16, help="prompts to test, the first of prompts.txt")
    parser.add_argument("--calibrate", type=int, default=8, help="prompts to calibrate on, the last of prompts.txt")
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
    profile = dit_accel.calibrate(
        pipe,
        prompts,
        args.method,
        target=f"error:{last:g}",
        control=control,
        errors=further,
        folder=args.out / "work",
        seed=10_000,
        **call,
    )
    assert isinstance(profile, Profile)
    print(f"{control}: calibrated on {len(prompts)} prompts in {time.perf_counter() - began:.0f} s")
    for point in profile.curve.points if profile.curve is not None else ():
        print(f"  error {point.error:<8g} {point.psnr:6.2f} dB  density {point.density:.3f}")
    return dataclasses.replace(profile, name=f"{args.model.name}, {args.method}, {control}")


def sample(pipe: Any, prompt: str, seed: int, call: dict[str, Any]) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return pictures(pipe(prompt=prompt, generator=generator, output_type="np", **call))


def measured(
    pipe: Any, work: WorkFolder, profile: Profile, control: str, target: float, prompts: list[str], call: dict[str, Any]
) -> list[dict[str, float]]:
    """PSNR and work of each prompt, in order."""
    found: list[dict[str, float]] = []
    for index, prompt in enumerate(prompts):
        name = f"{control}-{target:g}-{index}"
        row = work.result(name)
        if row is None:
            kept = work.tensors(f"dense-{index}")
            if kept is None:
                work.put_tensors(f"dense-{index}", {"pictures": sample(pipe, prompt, index, call)}, {})
                kept = work.tensors(f"dense-{index}")
                assert kept is not None
            with dit_accel.enabled(pipe, profile=profile, target_psnr=target, min_tokens=0) as handle:
                made = sample(pipe, prompt, index, call)
                density = next(iter(handle.stats().values())).density
            row = {"psnr": psnr(made, kept[0]["pictures"]), "density": density}
            work.put_result(name, row)
        found.append(row)
    return found


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
    prompts = [line.strip() for line in (args.model / "prompts.txt").read_text().splitlines() if line.strip()]
    if len(prompts) < args.count + args.calibrate:
        raise SystemExit(
            f"{len(prompts)} prompts are too few for {args.count} to test and {args.calibrate} to calibrate"
        )
    tested, seen = prompts[: args.count], prompts[-args.calibrate :]
    pipe = load(args.model, torch.device(args.device))
    call = {
        "height": args.size,
        "width": args.size,
        "num_frames": args.frames,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
    }
    profiles = {control: calibrated(pipe, args, seen, control, call) for control in args.controls}
    settings = {"call": call, "method": args.method, "profiles": {c: repr(p.curve) for c, p in profiles.items()}}
    work = WorkFolder(args.out / "test", settings)
    rows: list[dict[str, Any]] = []
    for control, profile in profiles.items():
        assert profile.curve is not None
        for target in args.targets:
            found = measured(pipe, work, profile, control, target, tested, call)
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

        # The point in the middle was measured on the calibration prompts; what the file says of its quality is that.
        shipped = retarget(profiles[args.ship], parse_target("psnr:35"))
        print(f"wrote {shipped.save(args.write_profile)}")


if __name__ == "__main__":
    main()
