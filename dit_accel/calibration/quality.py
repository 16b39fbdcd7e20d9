"""PSNR between what a pipeline makes dense and accelerated."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["MOST_DB", "pictures", "psnr"]

#: PSNR of outputs that are equal.
MOST_DB = 100.0


def pictures(output: Any) -> Tensor:
    """What a pipeline returned, as uint8 pictures, or as float32 where it is not pictures but latents.

    Raises:
        ValueError: if there is nothing that could be compared.
    """
    for name in ("frames", "images"):
        if hasattr(output, name):
            output = getattr(output, name)
            break
    else:
        output = output[0] if isinstance(output, tuple) else output
    found = _tensor(output)
    if not bool(torch.isfinite(found.float()).all()):
        raise ValueError("the pipeline made NaN or infinity, which cannot be compared")
    if found.dtype == torch.uint8:
        return found
    found = found.detach().float().cpu()
    inside = found.ndim >= 3 and float(found.min()) >= 0 and float(found.max()) <= 1
    return (found * 255).round().to(torch.uint8) if inside else found


def _tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output.cpu()
    if isinstance(output, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(output))
    if isinstance(output, list | tuple) and output:
        return torch.stack([_tensor(item) for item in output])
    try:  # a picture of PIL
        found = np.array(output)
    except (TypeError, ValueError):
        found = np.empty(0)
    if found.dtype.kind not in "uif" or not found.size:
        raise ValueError(f"expected frames, images or latents of a pipeline, got {type(output).__name__}")
    return torch.from_numpy(found)


def psnr(output: Tensor, reference: Tensor) -> float:
    """PSNR in dB of each of the :func:`pictures`, at most 100, averaged over them; of latents as a whole.

    The peak of latents is their range.

    Raises:
        ValueError: if the shapes differ.
    """
    if output.shape != reference.shape:
        raise ValueError(f"outputs must have one shape, got {list(output.shape)} and {list(reference.shape)}")
    error = (output.double() - reference.double()).square()
    if reference.dtype != torch.uint8:
        return _decibel(float(error.mean()), float(reference.max() - reference.min()))
    found = [_decibel(mse, 255.0) for mse in error.flatten(-3).mean(-1).flatten().tolist()]
    return sum(found) / len(found)


def _decibel(mse: float, peak: float) -> float:
    return MOST_DB if mse <= 0 else min(10 * math.log10(max(peak, 1e-12) ** 2 / mse), MOST_DB)
