"""Evaluate a pipeline that you have loaded and set up yourself, with configurations of your own.

    python examples/evaluate_your_pipeline.py

Replace `load` by your own: another model, LoRA, offloading, a compiled transformer. What the pipeline computes is told
apart by a digest of its weights, so a folder of results never mixes two of them.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dit_accel_eval import Configuration, EvalOptions, evaluate
from dit_accel_eval.cli.progress import ProgressObserver
from dit_accel_eval.report import write_report, write_summary

WAN = Path(__file__).parent / "tiny_wan"


def load() -> Any:
    """Your pipeline."""
    from diffusers import WanPipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = WanPipeline.from_pretrained(WAN, torch_dtype={"default": dtype, "vae": torch.float32})
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


#: Any options of dit_accel.enable; dense with another seed says how far apart unrelated clips are.
ROWS = [
    Configuration("another seed", seed_offset=1000),
    Configuration("as it ships", "auto"),
    Configuration("longer warm-up", "auto", {"warmup": 0.25}),
    Configuration("first layer dense", "auto", {"dense_layers": [0]}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="+", default=["octopus", "crab"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--out", type=Path, default=Path("my-run"))
    args = parser.parse_args()
    options = EvalOptions(
        configurations=ROWS,
        steps=args.steps,
        frames=args.frames,
        guidance=4.0,
        call={"negative_prompt": ""},
        metrics=["psnr", "ssim"],
    )
    with ProgressObserver(Console()) as observer:
        results = evaluate(load(), args.prompts, args.out, options, observer=observer)
    assert results is not None
    for row in results["rows"][1:]:
        psnr = row["metrics"].get("psnr")
        print(f"{row['name']:18} " + (f"{psnr['mean']:.2f} dB" if psnr else row["error"]))
    print(write_summary(args.out))
    print(write_report(args.out))


if __name__ == "__main__":
    main()
