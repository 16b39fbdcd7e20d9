"""Compare methods at equal work on a pipeline: python examples/compare_methods.py --out methods-run

A run that was stopped goes on where it was. The report is methods-run/report.html.
"""

import argparse
from pathlib import Path

from rich.console import Console

from dit_accel_eval import EvalOptions, evaluate
from dit_accel_eval.cli.progress import ProgressObserver
from dit_accel_eval.report import write_report

WAN = Path(__file__).parent / "tiny_wan"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--pipeline", default=str(WAN), help="folder or Hub name")
parser.add_argument("--prompts", type=Path, default=WAN / "prompts.txt")
parser.add_argument("--methods", nargs="+", default=["auto", "adaspa", "paro"])
parser.add_argument("--density", nargs="+", type=float, default=[0.6], help="work of the whole run over dense work")
parser.add_argument("--count", type=int, default=2, help="prompts")
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--out", type=Path, default=Path("methods-run"))
args = parser.parse_args()

options = EvalOptions(
    methods=args.methods,
    densities=args.density,
    limit=args.count,
    steps=args.steps,
    guidance=4.0,
    metrics=["psnr", "ssim", "flicker_difference"],
)
with ProgressObserver(Console()) as observer:
    results = evaluate(args.pipeline, args.prompts, args.out, options, observer=observer)
assert results is not None  # None on all processes but the first, under torchrun

print(f"{'configuration':16} {'work':>6} {'PSNR':>7} {'SSIM':>7} {'speed-up':>9}")
for row in results["rows"]:
    if row["metrics"]:
        work, quality = row["density"].get("run", 1.0), row["metrics"]
        psnr, ssim = quality["psnr"]["mean"], quality["ssim"]["mean"]
        print(f"{row['name']:16} {work:6.3f} {psnr:7.2f} {ssim:7.4f} {row['speed']['speedup']:9.2f}")
    elif "error" in row:
        print(f"{row['name']:16} {row['error']}")
print(write_report(args.out))
