"""Generate pictures with an exported pipeline and lay them out as one, each above its prompt.

python sample.py --model ../tiny_flux --prompts ../tiny_flux/prompts.txt --out grid.webp
"""

from __future__ import annotations

import argparse
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image, ImageDraw


def load(folder: Path, device: str = "cpu") -> FluxPipeline:
    """Read the pipeline from disk, without looking anywhere else."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = FluxPipeline.from_pretrained(str(folder), torch_dtype=dtype, local_files_only=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: FluxPipeline,
    prompts: list[str],
    seed: int,
    steps: int = 28,
    guidance: float = 1.0,
    size: int = 256,
    length: int = 128,
) -> np.ndarray:
    """Pictures as uint8 (prompt, height, width, 3); every prompt has the generator of its own seed."""
    generators = [torch.Generator("cpu").manual_seed(seed + index) for index in range(len(prompts))]
    pictures = pipe(
        prompt=prompts,
        negative_prompt=[""] * len(prompts) if guidance > 1 else None,
        true_cfg_scale=guidance,
        height=size,
        width=size,
        max_sequence_length=length,
        num_inference_steps=steps,
        generator=generators,
        output_type="np",
    ).images
    return (np.asarray(pictures) * 255).round().astype(np.uint8)


def grid(prompts: list[str], pictures: np.ndarray, columns: int = 6, size: int = 160) -> Image.Image:
    """Rows of pictures with their prompts below."""
    below = 44
    rows = -(-len(prompts) // columns)
    sheet = Image.new("RGB", (columns * size, rows * (size + below)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        x, y = index % columns * size, index // columns * (size + below)
        sheet.paste(Image.fromarray(picture).resize((size - 4, size - 4), Image.Resampling.LANCZOS), (x + 2, y + 2))
        draw.multiline_text((x + 2, y + size), "\n".join(textwrap.wrap(prompt, size // 6)), fill="black", spacing=1)
    return sheet


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Generate pictures and lay them out as one.")
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "tiny_flux")
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("--prompts", type=Path, help="a file with one prompt a line")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=1.0, help="true_cfg_scale")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--length", type=int, default=128, help="max_sequence_length")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--show", type=int, default=160, help="side of a picture in the layout")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("grid.png"))
    args = parser.parse_args()
    prompts = args.prompt + (args.prompts.read_text().split("\n") if args.prompts else [])
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    pipe = load(args.model, args.device)
    made = []
    began = time.time()
    for index in range(0, len(prompts), args.batch):
        some = prompts[index : index + args.batch]
        made.append(generate(pipe, some, args.seed + index, args.steps, args.guidance, args.size, args.length))
    grid(prompts, np.concatenate(made), args.columns, args.show).save(args.out, quality=85)
    print(f"{len(prompts)} pictures in {time.time() - began:.1f} s -> {args.out}")


if __name__ == "__main__":
    main()
