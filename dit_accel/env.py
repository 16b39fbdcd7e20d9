"""What this machine offers: versions, devices, and each kernel backend with the reason why it cannot serve."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import warnings
from typing import Any

import torch

__all__ = ["PACKAGES", "backends", "collect", "gpus", "versions"]

#: Distributions whose version decides what works.
PACKAGES = (
    "dit-accel",
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "xformers",
    "torchmetrics",
    "imageio-ffmpeg",
)
_VARIABLES = ("DIT_ACCEL_BACKEND", "DIT_ACCEL_LOG_LEVEL", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")
_HEAD_DIM = 128
_BLOCK = 64


def versions() -> dict[str, str | None]:
    """Installed version of each package that matters, ``None`` where it is missing. Imports none of them."""
    from dit_accel._version import __version__

    found = {name: _installed(name) for name in PACKAGES}
    found["dit-accel"] = __version__
    found["triton"] = found["triton"] or _installed("triton-windows")
    return found


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpus() -> list[dict[str, Any]]:
    """Name, memory and compute capability of each GPU that torch sees."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "index": index,
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return found


def backends() -> list[dict[str, Any]]:
    """Each backend: whether it serves on this machine's best device, why not, and whether it would be chosen.

    Usable means that its self-test passed, so kernels run here.
    """
    from dit_accel_kernels import choose_backend, self_test, why_not
    from dit_accel_kernels.backends import BACKENDS

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    case: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "head_dim": _HEAD_DIM,
        "block_q": _BLOCK,
        "block_k": _BLOCK,
    }
    tested = f"{device.type}, {str(dtype).removeprefix('torch.')}, head_dim {_HEAD_DIM}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reasons are in the rows
        chosen, _ = choose_backend(**case)
    rows = []
    for name in BACKENDS:
        reason = why_not(name, **case)
        if reason is None and BACKENDS[name].devices:  # the others compile for a while
            reason = self_test(name, device, dtype, _HEAD_DIM, _BLOCK, _BLOCK)
        row = {"name": name, "usable": reason is None, "reason": reason, "automatic": name == chosen, "tested": tested}
        rows.append(row)
    return rows


def collect() -> dict[str, Any]:
    """Everything above as plain JSON types."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"machine": platform.machine(), "threads": torch.get_num_threads()},
        "versions": versions(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "gpus": gpus(),
        "backends": backends(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
