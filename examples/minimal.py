"""One line on a real pipeline: python examples/minimal.py "red heart"."""

import sys
from pathlib import Path

import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

import dit_accel

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
folder = Path(__file__).parent / "tiny_wan"
pipe = WanPipeline.from_pretrained(folder, torch_dtype={"default": dtype, "vae": torch.float32}).to(device)

handle = dit_accel.enable(pipe)  # the one line

prompt = sys.argv[1] if len(sys.argv) > 1 else "octopus"
clip = pipe(prompt, height=128, width=128, num_frames=33, num_inference_steps=12, guidance_scale=4.0).frames[0]
print(dit_accel.status(pipe)["transformer"])  # what was computed, what stayed dense and why
print(export_to_video(clip, "minimal.mp4", fps=16))  # needs imageio and imageio-ffmpeg, of the extra eval

handle.disable()  # the original objects, by identity
