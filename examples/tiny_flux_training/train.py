"""Train everything within a budget of seconds, and export it. There is no data to fetch: scenes are painted as needed.

python train.py --work run --vae-seconds 40 --dit-seconds 210
python train.py --work run2 --resume run/export --dit-seconds 200     # further, from what an earlier run exported
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from export import export
from fit_dit import BATCHES, LENGTHS, Pool, Trainer
from fit_vae import encode, fit_vae, measure
from paint import paint
from parts import CHANNELS, POOLED_LENGTH, SHORT_LENGTH, TEXT_LENGTH, count
from scenes import Grammar, vocabulary

BEGAN = time.time()
#: Small enough for a CPU to run all of it within minutes.
TOY = {"heads": 1, "layers": 1, "single_layers": 1}
_DECAY = 0.4  # share of the time over which the learning rate falls to zero
_VALIDATION = 10_000  # seed


def say(text: str) -> None:
    """Print with the seconds since the start."""
    print(f"[{time.time() - BEGAN:6.1f}] {text}", flush=True)


def pictures_of(seed: int, number: int, size: int, device: torch.device) -> tuple[torch.Tensor, list[str]]:
    """Painted scenes, uint8 [N, 3, size, size], and their sentences."""
    grammar, painted = Grammar(seed), []
    batch = max(1, 64 * 256 * 256 // size**2) if device.type == "cuda" else 4
    scenes = [grammar.draw() for _ in range(number)]
    scenes.sort(key=lambda scene: len(scene.things))  # a batch is painted object by object
    for start in range(0, number, batch):
        picture = paint(scenes[start : start + batch], size, device)
        painted.append(((picture + 1) * 127.5).round().clamp(0, 255).byte())
    return torch.cat(painted), [scene.text for scene in scenes]


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the tiny FLUX within a budget of seconds.")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--resume", type=Path, help="exported pipeline whose weights are trained further")
    parser.add_argument("--vae", type=Path, help="a VAE to train further, instead of a new one")
    parser.add_argument("--vae-seconds", type=float, default=40)
    parser.add_argument("--dit-seconds", type=float, default=210)
    parser.add_argument("--until", type=float, default=1e9, help="stop training at this second of the run")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--small", type=int, default=32_000, help="pictures of 128 x 128")
    parser.add_argument("--large", type=int, default=12_000, help="pictures of 256 x 256")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--toy", action="store_true", help="a model small enough for a CPU")
    parser.add_argument("--half", action="store_true", help="bfloat16 on a CPU, too")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--warm-up-only", action="store_true")
    return parser.parse_args()


def small_share(progress: float, resumed: bool) -> float:
    """Share of small pictures among the steps, by the part of the time that is over."""
    if resumed:
        return 0.75 if progress < 0.5 else 0.08
    return 0.95 if progress < 0.35 else 0.08


def warm_up(trainer: Trainer, device: torch.device, folder: Path) -> None:
    """Run steps of every size on noise, so that the compiler's cache on disk is filled; files tell how far it is."""
    for length in (SHORT_LENGTH, TEXT_LENGTH):
        for side, batch in BATCHES.items():
            if length not in LENGTHS[side]:
                continue
            began = time.time()
            latents = torch.randn(batch, CHANNELS, 2 * side, 2 * side, device=device)
            ids = torch.ones(batch, POOLED_LENGTH, dtype=torch.long, device=device)
            losses = [float(trainer.step(Pool(latents, ids), 1e-3, length)) for _ in range(4)]
            say(f"side {side}, text {length}: compiled in {time.time() - began:.1f} s, losses {losses}")
        path = folder / f"compiled_{length}"
        path.with_suffix(".part").write_text("finite" if trainer.is_finite() else "NaN")
        path.with_suffix(".part").rename(path)


class Compiling:
    """The warm-up in a process of its own, and the switch to compiled blocks once it has shown that they work.

    Args:
        folder: where the warm-up tells how far it is.
        wanted: whether there is to be one.
    """

    def __init__(self, folder: Path, wanted: bool) -> None:
        self.folder, self.wanted = folder, wanted
        for path in folder.glob("compiled_*"):
            path.unlink()
        self.process = subprocess.Popen([sys.executable, *sys.argv, "--warm-up-only"]) if wanted else None

    def end(self) -> None:
        """Stop the warm-up where it is."""
        if self.process is not None:
            self.process.kill()

    def check(self, trainer: Trainer) -> None:
        """Compile when the warm-up is far enough."""
        path = self.folder / f"compiled_{SHORT_LENGTH}"
        if not self.wanted or not path.is_file():
            return
        self.wanted = False
        if path.read_text() != "finite":
            say("compiled steps do not work; going on without the compiler")
            return
        say(f"compiled from step {trainer.steps} on")
        trainer.compile()
        trainer.long_texts = (self.folder / f"compiled_{TEXT_LENGTH}").is_file


def get_vae(args: argparse.Namespace, sets: list[torch.Tensor]) -> AutoencoderKL:
    """Train the VAE, or read the one of an earlier run, whose latents the transformer knows."""
    if args.resume:
        return AutoencoderKL.from_pretrained(args.resume / "vae").to(sets[0].device).eval()
    start = AutoencoderKL.from_pretrained(args.vae) if args.vae else None
    return fit_vae(sets, args.vae_seconds, 2 * 128 * 128 if args.toy else 8 * 256 * 256, start)


def main() -> None:
    """Run all stages."""
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    args.work.mkdir(parents=True, exist_ok=True)
    shape = TOY if args.toy else {}
    if args.toy:
        BATCHES.update(dict.fromkeys(BATCHES, 2))
    compiled = device.type == "cuda" and not args.no_compile
    if not args.warm_up_only:
        compiling = Compiling(args.work, compiled)
    # The backward pass of cuDNN's attention makes NaN at some lengths (pytorch issue 196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    trainer = Trainer(vocabulary(), device, shape, args.rate, half=device.type == "cuda" or args.half)
    models = trainer.models
    say(f"{ {name: round(count(module), 3) for name, module in models.items()} } M, {len(trainer.long)} words")
    if args.warm_up_only:
        trainer.compile()
        warm_up(trainer, device, args.work)
        return

    large, told_large = pictures_of(args.seed, args.large, 256, device)
    small, told_small = pictures_of(args.seed + 1, args.small, 128, device)
    unseen, told_unseen = pictures_of(_VALIDATION, 8 if args.toy else 256, 256, device)
    say(f"painted {len(large)} and {len(small)} pictures")
    vae = get_vae(args, [large, small])
    vae_psnr = measure(vae, unseen)
    say(f"vae {count(vae):.3f} M, PSNR {vae_psnr:.2f} dB on unseen pictures of 256 x 256")
    pools = {
        pictures.shape[-1] // 4: Pool(encode(vae, pictures), trainer.tokens(told))
        for pictures, told in ((small, told_small), (large, told_large))
    }
    validation = Pool(encode(vae, unseen), trainer.tokens(told_unseen))
    del large, small, unseen
    say("encoded")
    if args.resume:
        trainer.load(args.resume)

    def keep() -> None:
        export(args.work / "export", vae, trainer.ema, (trainer.short, trainer.long))

    def rate_at(progress: float, steps: int) -> float:
        return args.rate * min(1.0, (steps + 1) / 100, max(0.0, (1 - progress) / _DECAY))

    seconds = min(args.dit_seconds, args.until - (time.time() - BEGAN))
    say(f"training for {seconds:.0f} s")
    trainer.run(pools, partial(small_share, resumed=bool(args.resume)), seconds, rate_at, keep, compiling.check)
    compiling.end()
    keep()
    loss = trainer.loss_of(validation)
    say(f"{trainer.steps} steps, pictures seen {dict(trainer.seen)}, validation loss {loss:.4f}")
    notes = {
        "steps": trainer.steps,
        "seconds": round(trainer.seconds, 1),
        "pictures_seen": dict(trainer.seen),
        "validation_loss": loss,
        "vae_psnr": vae_psnr,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
    }
    (args.work / "notes.json").write_text(json.dumps(notes, indent=1))


if __name__ == "__main__":
    main()
