"""Dense and accelerated beside one another: time, distance and a picture of the difference."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel_patches.comfyui.patching import decelerate, session_of
from dit_accel_patches.comfyui.sampling import Sampling, decode

__all__ = ["Comparison", "compare", "difference", "psnr"]


@dataclass(frozen=True)
class Comparison:
    """Two samplings from the same noise.

    Attributes:
        accelerated, dense: pictures ``[N, H, W, 3]`` in 0 to 1.
        gain: factor of the difference picture.
        accelerated_s, dense_s: seconds of the samplings, decoding left out.
        status: what the accelerated one computed.
    """

    accelerated: Tensor
    dense: Tensor
    gain: float
    accelerated_s: float
    dense_s: float
    status: str

    @property
    def difference(self) -> Tensor:
        """Absolute difference times the gain, ``[N, H, W, 3]``."""
        return difference(self.accelerated, self.dense, self.gain)

    @property
    def report(self) -> str:
        """Numbers and counts as text."""
        value = psnr(self.accelerated, self.dense)
        return "\n".join(
            (
                f"PSNR {value:.2f} dB between accelerated and dense (identical pictures give inf)",
                f"sampling: dense {self.dense_s:.2f} s, accelerated {self.accelerated_s:.2f} s, "
                f"{self.dense_s / max(self.accelerated_s, 1e-9):.2f} x; the first run of a shape also compiles kernels, "
                "run again for a fair time",
                self.status,
            )
        )


def compare(model: Any, vae: Any, sampling: Sampling, gain: float = 8.0) -> Comparison:
    """Sample densely and accelerated from the same noise.

    Raises:
        ValueError: if the model is not accelerated, or the VAE does not give pictures.
    """
    session = session_of(model)
    dense, dense_s = _timed(sampling, decelerate(model))
    fast, fast_s = _timed(sampling, model)
    status = "\n".join(map(str, session.status())) or "nothing was accelerated"
    return Comparison(decode(vae, fast), decode(vae, dense), gain, fast_s, dense_s, status)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of pictures in 0 to 1, decibels; infinite for equal ones."""
    error = (a.detach().double().cpu() - b.detach().double().cpu()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def difference(a: Tensor, b: Tensor, gain: float) -> Tensor:
    """``|a - b| * gain``, cut off at 1."""
    return ((a - b).abs() * gain).clamp(0, 1)


def _timed(sampling: Sampling, model: Any) -> tuple[dict[str, Any], float]:
    _wait()
    start = time.perf_counter()
    latent = sampling(model)
    _wait()
    return latent, time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
