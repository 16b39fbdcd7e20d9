"""Frames as VBench hands them to networks: resized without antialiasing and rounded to uint8 again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel_eval.vbench.formulas import Frames

__all__ = ["CLIP", "IMAGENET", "clip_input", "dino_input", "musiq_input", "resize", "to_planes"]

#: Mean and standard deviation that CLIP and ImageNet networks expect.
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def to_planes(frames: Frames, device: str = "cpu") -> Tensor:
    """uint8 ``[T, 3, H, W]`` of ``[T, H, W, 3]``."""
    return torch.from_numpy(frames.copy()).to(device).permute(0, 3, 1, 2)


def resize(planes: Tensor, height: int, width: int, mode: str = "bilinear") -> Tensor:
    """Resize uint8 ``[T, 3, H, W]`` without antialiasing and round, as torchvision does with ``antialias=False``."""
    if planes.shape[2:] == (height, width):
        return planes
    resized = F.interpolate(planes.float(), size=(height, width), mode=mode, align_corners=False)
    return resized.round().clamp(0, 255).byte()


def _shorter(planes: Tensor, side: int, mode: str) -> Tensor:
    """Bring the shorter side to ``side``; the longer one is rounded down."""
    height, width = planes.shape[2:]
    if height <= width:
        return resize(planes, side, int(side * width / height), mode)
    return resize(planes, int(side * height / width), side, mode)


def _normalise(planes: Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    mean, deviation = (torch.tensor(x, device=planes.device).view(1, 3, 1, 1) for x in statistics)
    return (planes.float() / 255 - mean) / deviation


def dino_input(planes: Tensor) -> Tensor:
    """Shorter side 224, nothing cut off, ImageNet's statistics."""
    return _normalise(_shorter(planes, 224, "bilinear"), IMAGENET)


def clip_input(planes: Tensor) -> Tensor:
    """Shorter side 224 bicubic, the centre cut out, CLIP's statistics."""
    planes = _shorter(planes, 224, "bicubic")
    height, width = planes.shape[2:]
    top, left = round((height - 224) / 2), round((width - 224) / 2)
    return _normalise(planes[:, :, top : top + 224, left : left + 224], CLIP)


def musiq_input(planes: Tensor) -> Tensor:
    """Longer side at most 512, on [0, 1]."""
    height, width = planes.shape[2:]
    if max(height, width) > 512:
        scale = 512 / max(height, width)
        planes = resize(planes, int(scale * height), int(scale * width))
    return planes.float() / 255
