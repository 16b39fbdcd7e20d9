"""What the table of methods must know of a model: whether it makes clips or pictures, how it is called, what is usual."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import dit_accel
from dit_accel.learned import missing_scorer
from dit_accel_eval.pipelines import IMAGE_CLASSES, load_pipeline, pipeline_class

__all__ = ["VARIANTS", "call_of", "fill", "is_image", "lacking", "model_folder", "open_model", "preset_of"]

_EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
_RESULTS = Path(__file__).resolve().parent / "results"
_VIDEO: dict[str, Any] = {
    "frames": 65,
    "steps": 30,
    "guidance": 4.0,
    "size": 128,
    "density": [0.5, 0.3, 0.2, 0.1],
    "metrics": ["psnr", "ssim", "lpips_alex", "flicker_difference"],
    "out": Path("methods-table"),
}
_IMAGE: dict[str, Any] = {
    "frames": 1,
    "steps": 28,
    "guidance": None,
    "size": 256,
    "density": [0.5, 0.3, 0.2],
    "metrics": ["psnr", "ssim", "lpips_alex"],
    "out": _RESULTS / "methods_table_image",
}
#: A small run that shows that the script works.
_TOY_VIDEO = {"count": 1, "frames": 17, "steps": 6, "density": [0.6]}
_TOY_IMAGE = {"count": 1, "size": 128, "steps": 6, "density": [0.6]}

#: Methods that are about frames, and what becomes of them where there is one.
_FRAMES = {
    "svg1": "its heads are spatial or temporal; in one frame both masks are one band in raster order",
    "radial": "its bands narrow with the distance between frames; in one frame it is one band in raster order",
    "vmoba": "its layers take turns in chunks of time, of the picture and of both; one frame has no time",
}
#: Rows besides the presets: what they are named, the preset, and what is changed of it.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sol, bricks": ("sol", {"order": "brick"}),
    "sol, Morton": ("sol", {"order": "morton"}),
    "pisa, bricks": ("pisa", {"order": "brick"}),
    "auto, 128 x 64": ("auto", {"block_q": 128, "block_k": 64}),
    "auto, nothing kept": ("auto", {"compensate": "first_order:64", "warmup": 0.0, "dense_share": 0.0}),
    "auto, query means": ("auto", {"compensate": "residual:query_mean,64"}),
    "auto, as for video": ("auto", {"pictures": ()}),
    "auto, first order": ("auto", {"compensate": "first_order:64"}),
}


def preset_of(name: str) -> tuple[str, dict[str, Any]]:
    """The preset of a row and what is changed of it."""
    return VARIANTS.get(name, (name, {}))


def model_folder(text: str) -> Path:
    """A folder, or the name of one of the examples, such as ``tiny_flux``."""
    return Path(text) if Path(text).is_dir() or not (_EXAMPLES / text).is_dir() else _EXAMPLES / text


def is_image(folder: Path) -> bool:
    """Whether a pipeline makes pictures."""
    return pipeline_class(folder) in IMAGE_CLASSES


def lacking(name: str, args: argparse.Namespace) -> str | None:
    """Why a method has no form for the model; ``None`` where it has."""
    return _FRAMES.get(name) if is_image(args.model) else None


def fill(args: argparse.Namespace) -> None:
    """Give the arguments that were left out what is usual for the model."""
    image = is_image(args.model)
    if args.methods is None:
        names = [m.name for m in dit_accel.methods() if not m.is_dense and missing_scorer(m) is None]
        args.methods = [*names, *VARIANTS] if image else names
    for name, value in (_IMAGE if image else _VIDEO).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.toy:
        for name, value in (_TOY_IMAGE if image else _TOY_VIDEO).items():
            setattr(args, name, value)


def open_model(args: argparse.Namespace) -> Any:
    """The pipeline, on its device."""
    return load_pipeline(args.model, torch.device(args.device))


def call_of(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the pipeline's call, less prompts and noise."""
    call = {"height": args.size, "width": args.size, "num_inference_steps": args.steps}
    if is_image(args.model):
        return {**call, "max_sequence_length": args.text}  # distilled or without guidance: one pass a step
    return {**call, "num_frames": args.frames, "guidance_scale": args.guidance}
