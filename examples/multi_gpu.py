"""Several GPUs: one long video on all of them, or many prompts side by side.

    torchrun --nproc-per-node 2 examples/multi_gpu.py --mode context --prompt "red heart"
    torchrun --nproc-per-node 2 examples/multi_gpu.py --mode data --prompts prompts.txt

Without GPUs the processes talk through gloo on the CPU, which is slow and good for a look. ``accelerate launch
--num_processes 2`` in place of torchrun does the same.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, WanPipeline
from diffusers.utils import export_to_video
from torch.distributed.device_mesh import init_device_mesh

import dit_accel

TINY = Path(__file__).parent / "tiny_wan"


def options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=["context", "data"], default="context")
    parser.add_argument("--model", default=str(TINY), help="folder or name of a Wan pipeline")
    parser.add_argument("--method", default="auto", help="of dit_accel, or 'dense'")
    parser.add_argument("--prompt", default="red heart", help="for --mode context")
    parser.add_argument("--prompts", type=Path, default=TINY / "prompts.txt", help="for --mode data, one a line")
    parser.add_argument("--count", type=int, default=4, help="most prompts")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--size", type=int, default=128, help="height and width")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--min-tokens", type=int, default=1024, help="shorter sequences stay dense")
    parser.add_argument("--out", type=Path, default=Path("multi_gpu"))
    return parser.parse_args()


def load(args: argparse.Namespace, device: torch.device) -> WanPipeline:
    """The pipeline on the device of this process."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = WanPipeline.from_pretrained(args.model, torch_dtype={"default": dtype, "vae": torch.float32}).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: WanPipeline, prompt: str, args: argparse.Namespace) -> Any:
    """One clip; the same noise on every process, as its parts must fit together."""
    made = torch.Generator("cpu").manual_seed(0)
    sizes = {"height": args.size, "width": args.size, "num_frames": args.frames}
    return pipe(prompt, generator=made, num_inference_steps=args.steps, guidance_scale=4.0, **sizes).frames[0]


def spread(pipe: WanPipeline, device: torch.device) -> None:
    """diffusers' own engine: tokens are sharded, and heads while attention runs."""
    size = dist.get_world_size()
    if device.type == "cpu":  # diffusers asks for the number of accelerators, which there are none of
        torch.accelerator.device_count = lambda: size  # type: ignore[assignment]
    mesh = init_device_mesh(device.type, (1, size), mesh_dim_names=("ring", "ulysses"))
    config = ContextParallelConfig(ulysses_degree=size, mesh=mesh)
    for name in ("transformer", "transformer_2"):
        transformer = getattr(pipe, name, None)
        if transformer is not None:
            transformer.enable_parallelism(config=config)


def one_video(pipe: WanPipeline, args: argparse.Namespace, device: torch.device) -> list[str]:
    """All processes work on one clip; the first writes it."""
    if dist.get_world_size() > 1:
        spread(pipe, device)
    with dit_accel.enabled(pipe, args.method, min_tokens=args.min_tokens) as handle:
        clip = generate(pipe, args.prompt, args)
        told = str(handle.stats()["transformer"])
    if dist.get_rank() != 0:
        return []
    export_to_video(clip, str(args.out / "context.mp4"), fps=16)
    return [told]


def many_prompts(pipe: WanPipeline, args: argparse.Namespace) -> list[str]:
    """Each process has a pipeline of its own and takes every N-th prompt, of N processes."""
    lines = args.prompts.read_text(encoding="utf-8").splitlines()
    prompts = [line.strip() for line in lines if line.strip()][: args.count]
    told = []
    with dit_accel.enabled(pipe, args.method, min_tokens=args.min_tokens) as handle:
        for number in range(dist.get_rank(), len(prompts), dist.get_world_size()):
            clip = generate(pipe, prompts[number], args)
            export_to_video(clip, str(args.out / f"{number:03d}.mp4"), fps=16)
            density = handle.stats()["transformer"].density
            told.append(f"process {dist.get_rank()}: {prompts[number]!r}, density {density:.3f}")
    return told


def main() -> int:
    """Run under torchrun; alone it is one process."""
    args = options()
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        pipe = load(args, device)
        told = one_video(pipe, args, device) if args.mode == "context" else many_prompts(pipe, args)
        sys.stdout.write("".join(f"{line}\n" for line in told))
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
