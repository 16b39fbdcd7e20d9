"""Generate clips with an exported pipeline and lay their frames out as one picture.

python sample.py --model ../tiny_wan --prompt "octopus" --prompt "red heart" --frames 33 --out grid.png
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from PIL import Image, ImageDraw


def load(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> WanPipeline:
    """Read the pipeline from disk, without looking anywhere else."""
    pipe = WanPipeline.from_pretrained(str(folder), torch_dtype=dtype, local_files_only=True).to(device)
    pipe.vae.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: WanPipeline, prompts: list[str], frames: int, steps: int, guidance: float, seed: int) -> np.ndarray:
    """Clips as uint8 (prompt, time, height, width, 3); every prompt has the generator of its own seed."""
    device = pipe.transformer.device
    generators = [torch.Generator(device).manual_seed(seed + index) for index in range(len(prompts))]
    clips = pipe(
        prompt=prompts,
        height=128,
        width=128,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        output_type="np",
    ).frames
    return (np.asarray(clips) * 255).round().astype(np.uint8)


def grid(prompts: list[str], clips: np.ndarray, columns: int = 8, size: int = 128) -> Image.Image:
    """One row a prompt: its name, then frames spread over the clip."""
    left = 100
    sheet = Image.new("RGB", (left + columns * size, len(prompts) * size), "white")
    draw = ImageDraw.Draw(sheet)
    times = np.linspace(0, clips.shape[1] - 1, columns).round().astype(int)
    for row, (prompt, clip) in enumerate(zip(prompts, clips, strict=True)):
        draw.text((2, row * size + size // 2 - 16), "\n".join(prompt.split()), fill="black")
        for column, when in enumerate(times):
            frame = Image.fromarray(clip[when]).resize((size, size), Image.Resampling.LANCZOS)
            sheet.paste(frame, (left + column * size, row * size))
    return sheet


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Generate clips and lay out their frames.")
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "tiny_wan")
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("--prompts", type=Path, help="a file with one prompt a line")
    parser.add_argument("--frames", type=int, default=65, help="1 + a multiple of 2; 65 is native")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="side of a frame in the picture")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("grid.png"))
    args = parser.parse_args()
    prompts = args.prompt + (args.prompts.read_text().split("\n") if args.prompts else [])
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    pipe = load(args.model, args.device, torch.bfloat16 if args.device == "cuda" else torch.float32)
    clips = []
    began = time.time()
    for index in range(0, len(prompts), args.batch):
        some = prompts[index : index + args.batch]
        clips.append(generate(pipe, some, args.frames, args.steps, args.guidance, args.seed + index))
    grid(prompts, np.concatenate(clips), args.columns, args.size).save(args.out, quality=88)
    print(f"{len(prompts)} clips in {time.time() - began:.1f} s -> {args.out}")


if __name__ == "__main__":
    main()
