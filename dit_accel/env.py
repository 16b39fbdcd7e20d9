"""What this machine offers: versions, devices, and each kernel backend with the reason why it cannot serve."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import warnings
from typing import Any

import torch

__all__ = ["PACKAGES", "backends", "collect", "gpus", "settled_calls", "versions"]

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
_VARIABLES = (
    "DIT_ACCEL_BACKEND",
    "DIT_ACCEL_REPLAY",
    "DIT_ACCEL_LOG_LEVEL",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
)
_HEAD_DIM = 128
# Queries x keys of a block that a backend is asked about: 64 x 64 as presets have it, but where it takes none of these.
_BLOCKS = {"hopper": (128, 64), "flash4": (128, 128)}
_PRESETS = (64, 64)


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
    """Each backend: whether it serves on this machine's best device, why not, and whether ``auto`` would choose it.

    Usable means that its self-test passed, so kernels run here.
    """
    from dit_accel_kernels import choose_backend, self_test, why_not
    from dit_accel_kernels.backends import BACKENDS

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    case: dict[str, Any] = {"device": device, "dtype": dtype, "head_dim": _HEAD_DIM}
    rows: list[dict[str, Any]] = []
    for name in BACKENDS:
        q, k = _BLOCKS.get(name, _PRESETS)
        reason = why_not(name, **case, block_q=q, block_k=k)
        if reason is None and BACKENDS[name].devices:  # the others compile for a while
            reason = self_test(name, device, dtype, _HEAD_DIM, q, k)
        tested = f"{device.type}, {str(dtype).removeprefix('torch.')}, head_dim {_HEAD_DIM}, blocks of {q} x {k}"
        rows.append({"name": name, "usable": reason is None, "reason": reason, "automatic": False, "tested": tested})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reasons are in the rows
        chosen, _ = choose_backend(**case, block_q=_PRESETS[0], block_k=_PRESETS[1])
    if any(row["name"] == "hopper" and row["usable"] for row in rows):
        chosen = "hopper"  # whose blocks `auto` takes where it serves (Method.hopper_blocks)
    for row in rows:
        row["automatic"] = row["name"] == chosen
    return rows


def settled_calls() -> dict[str, Any]:
    """Whether sparse calls with nothing left to decide run without Python, and why not."""
    from dit_accel.replayed import VARIABLE, switched_off

    if switched_off():
        return {"in_c": False, "reason": f"{VARIABLE}={os.environ[VARIABLE]}"}
    from dit_accel_kernels import native

    reason = native.why_not()
    return {"in_c": reason is None, "reason": reason}


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
        "settled_calls": settled_calls(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
