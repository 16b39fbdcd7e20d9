"""Find the least work that keeps a PSNR against dense: python examples/tune_to_target.py --psnr 25

Bisection over the density of the sparse steps, on a few prompts. Each density tried is a run of its own in the folder, so
that a search that was stopped goes on where it was, and another target begins with what is known.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from dit_accel_eval import EvalOptions, evaluate
from dit_accel_eval.cli.progress import ProgressObserver
from dit_accel_eval.compare import Configuration
from dit_accel_eval.runs.pipeline import load_pipeline

WAN = Path(__file__).parent / "tiny_wan"


def bisect(psnr_at: Callable[[float], float], target: float, tries: int) -> float | None:
    """The lowest density found that reaches the target; ``None`` if every block together does not."""
    low, high = 0.0, 1.0
    if psnr_at(high) < target:
        return None
    for _ in range(tries):
        middle = (low + high) / 2
        low, high = (low, middle) if psnr_at(middle) >= target else (middle, high)
    return high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", default=str(WAN), help="folder or Hub name")
    parser.add_argument("--prompts", nargs="+", default=["octopus", "crab"])
    parser.add_argument("--method", default="auto")
    parser.add_argument("--psnr", type=float, default=25.0, help="dB, mean over the prompts")
    parser.add_argument("--tries", type=int, default=4, help="bisections: 4 give the density to a sixteenth")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--out", type=Path, default=Path("tuned"))
    args = parser.parse_args()
    pipe = load_pipeline(args.pipeline, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def psnr_at(density: float) -> float:
        row = Configuration(args.method, args.method, {"density": density})
        options = EvalOptions(
            configurations=[row],
            steps=args.steps,
            frames=args.frames,
            guidance=4.0,
            metrics=["psnr"],
            attention=False,
        )
        with ProgressObserver(Console()) as observer:
            results = evaluate(pipe, args.prompts, args.out / f"density-{density:g}", options, observer=observer)
        assert results is not None
        found = results["rows"][1]
        if "psnr" not in found["metrics"]:
            raise SystemExit(found["error"])
        if density < 1 and found["density"]["run"] == 1:
            raise SystemExit("nothing was sparse at this size, so there is nothing to tune; the warning says why")
        value: float = found["metrics"]["psnr"]["mean"]
        print(f"density {density:.4f} on sparse steps, {found['density']['run']:.3f} of the work: {value:.2f} dB")
        return value

    best = bisect(psnr_at, args.psnr, args.tries)
    if best is None:
        raise SystemExit(
            f"{args.method} does not reach {args.psnr:g} dB at any density: it differs in more than its mask"
        )
    print(f"dit_accel.enable(pipe, {args.method!r}, density={best:g})")


if __name__ == "__main__":
    main()
