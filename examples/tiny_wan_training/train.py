"""Train everything within a budget of seconds, and export it.

    python train.py --pack clips.zip --work run --vae-seconds 185 --dit-seconds 320

A schedule may be cut in two: give both runs the same `--horizon` (its whole length in seconds, over which the
learning rate falls to zero), and the second one `--resume`.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from data import load
from diffusers import AutoencoderKLWan
from export import export
from frames import FrameStore
from models import count
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_dit import BATCHES, Trainer, warm_up
from train_vae import encode_all, reconstruction_psnr, train_vae

BEGAN = time.time()
#: Small enough for a CPU to run all of it within minutes.
TOY = {"heads": 1, "layers": 2, "ffn_dim": 64}


def say(text: str) -> None:
    """Print with the seconds since the start."""
    print(f"[{time.time() - BEGAN:6.1f}] {text}", flush=True)


def choose_attention(device: torch.device) -> None:
    """Train with cuDNN's attention, the faster one on Hopper, where it works."""
    if device.type != "cuda":
        return
    query = torch.randn(2, 512, 5, 64, device=device, dtype=torch.bfloat16).transpose(1, 2)
    query.requires_grad_(True)
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            F.scaled_dot_product_attention(query, query, query).sum().backward()
    except RuntimeError as error:
        say(f"no cuDNN attention: {error}")
        return
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)


def get_vae(args: argparse.Namespace, store: FrameStore) -> AutoencoderKLWan:
    """Train the VAE, or read the one of an earlier run."""
    folder = args.work / "vae"
    if args.resume and folder.exists():
        return AutoencoderKLWan.from_pretrained(folder).to(store.device).eval()
    lengths = tuple(sorted({min(17, args.frames), args.frames}))
    vae = train_vae(store, args.vae_seconds, lengths, 2 * args.frames)
    vae.save_pretrained(folder)
    return vae


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the tiny Wan within a budget of seconds.")
    parser.add_argument("--pack", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--vae-seconds", type=float, default=110)
    parser.add_argument("--dit-seconds", type=float, default=420)
    parser.add_argument("--horizon", type=float, help="length of the whole schedule; default: this run")
    parser.add_argument("--until", type=float, default=1e9, help="stop training at this second of the run")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--phases", type=int, default=6)
    parser.add_argument("--frames", type=int, default=65)
    parser.add_argument("--limit", type=int, help="use only the first clips")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--toy", action="store_true", help="a model small enough for a CPU")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--warm-up-only", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Run all stages."""
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compiled = device.type == "cuda" and not args.no_compile
    torch.manual_seed(0)
    random.seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    args.work.mkdir(parents=True, exist_ok=True)
    lengths = [length for length in BATCHES if length <= (args.frames + 1) // 2]
    if args.toy:
        BATCHES.update(dict.fromkeys(BATCHES, 2))
    shape = TOY if args.toy else {}

    if args.warm_up_only:
        choose_attention(device)
        trainer = Trainer(["nothing"], device, shape)
        trainer.compile()
        warm_up(trainer, lengths)
        return
    warming = None
    if compiled and not args.resume:
        warming = subprocess.Popen([sys.executable, *sys.argv, "--warm-up-only"])

    clips = load(args.pack, args.limit)
    store = FrameStore(clips, device)
    say(f"{len(clips)} clips, {len(store.frames)} frames")
    vae = get_vae(args, store)
    say(f"vae: {count(vae):.3f} M, PSNR {reconstruction_psnr(vae, store, args.frames):.2f} dB")
    latents, owners = encode_all(vae, store, args.frames, args.phases)
    vae.save_pretrained(args.work / "vae")
    say(f"latents {tuple(latents.shape)}")
    if warming is not None:
        warming.wait()
        say("compiler is warm")

    choose_attention(device)
    trainer = Trainer(store.prompts, device, shape, args.rate)
    say(f"transformer {count(trainer.model):.3f} M, text encoder {count(trainer.text):.3f} M")
    if compiled:
        trainer.compile()
        warm_up(trainer, lengths)
    state = args.work / "state.pt"
    if args.resume:
        trainer.load(state)
    else:
        trainer = renew(trainer)
    say("training")
    left = min(args.dit_seconds, args.until - (time.time() - BEGAN))
    for part in (0.5, 0.5):
        trainer.run(latents, owners, left * part, args.horizon or left)
        trainer.save(state)
        export(args.work / "export", vae, trainer.ema_model, trainer.ema_text, trainer.tokenizer)
        seen = dict(trainer.clips_seen)
        say(f"saved after {trainer.steps} steps, {trainer.seconds:.0f} s, clips seen {seen}")
    notes = {"steps": trainer.steps, "seconds": trainer.seconds, "clips_seen": seen}
    (args.work / "notes.json").write_text(json.dumps(notes, indent=1))


def renew(trainer: Trainer) -> Trainer:
    """Forget the steps of the warm-up: they had a rate of zero, but left momentum behind."""
    for state in trainer.optimizer.adam.state.values():
        for value in state.values():
            value.zero_()
    for buffer in trainer.optimizer.muon.buffers:
        buffer.zero_()
    trainer.steps = 0
    return trainer


if __name__ == "__main__":
    main()
