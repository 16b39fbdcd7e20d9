"""Energy of a GPU from its own counter, through NVML where it is installed."""

from __future__ import annotations

import importlib
from typing import Any

import torch

__all__ = ["EnergyMeter"]


class EnergyMeter:
    """Reads the energy counter of one GPU.

    Attributes:
        missing: why there is no counter, ``None`` if there is one.
    """

    def __init__(self, device: torch.device) -> None:
        self.missing: str | None = None
        self._nvml: Any = None
        self._handle: Any = None
        if device.type != "cuda" or torch.version.hip is not None:
            self.missing = f"no NVML for device {device.type}"
            return
        try:
            # Optional, and without types: the distribution is called nvidia-ml-py.
            self._nvml = importlib.import_module("pynvml")
            self._nvml.nvmlInit()
            # By UUID: NVML numbers all GPUs, torch those that CUDA_VISIBLE_DEVICES leaves.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
            self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except ImportError:
            self.missing = "pynvml is not installed (pip install nvidia-ml-py)"
        except Exception as error:  # NVML's errors share no base with anything that is importable without it
            self.missing = f"NVML: {error}"

    def joules(self) -> float | None:
        """What the GPU has used since its driver was loaded, in joules; ``None`` without a counter."""
        if self.missing is not None:
            return None
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
