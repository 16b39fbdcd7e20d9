"""Which GPUs have which number formats. Imports no triton."""

from __future__ import annotations

from functools import lru_cache

import torch

__all__ = ["fp8_reason"]


def fp8_reason(device: torch.device) -> str | None:
    """Why e4m3 cannot be made and multiplied in hardware on a device, or ``None`` if it can.

    The CPU stands for Triton's interpreter, which can.

    Args:
        device: where the tensors are.
    """
    return _gpu_reason(device) if device.type == "cuda" else None


@lru_cache(maxsize=16)
def _gpu_reason(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        # CDNA3 has e4m3 with another bias and no negative zero; only CDNA4 and RDNA4 have that of the OCP and NVIDIA.
        name = torch.cuda.get_device_properties(device).gcnArchName
        return f"fp8 attention is not built for AMD GPUs, got {name}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        return f"fp8 needs compute capability 8.9, got {capability[0]}.{capability[1]}"
    return None
