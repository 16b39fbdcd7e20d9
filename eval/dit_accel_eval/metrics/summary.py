"""The metrics that need nothing but torchmetrics, in one call."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dit_accel_eval.metrics.frames import as_pair
from dit_accel_eval.metrics.pixel import flicker, psnr, psnr_clip, ssim

__all__ = ["Paired", "paired"]


@dataclass(frozen=True)
class Paired:
    """How far a clip is from its dense twin.

    Attributes:
        psnr: mean over frames of the PSNR of each, dB.
        psnr_clip: PSNR of the whole clip's mean squared error, dB.
        ssim: mean over frames, 1 for equal clips.
        flicker: temporal flicker score of the clip, 1 for a still one.
        flicker_difference: ``flicker`` minus that of the dense clip; above 0 is stiller than dense.
    """

    psnr: float
    psnr_clip: float
    ssim: float
    flicker: float
    flicker_difference: float

    def to_dict(self) -> dict[str, float]:
        """Plain JSON types."""
        return asdict(self)


def paired(clip: Any, reference: Any) -> Paired:
    """All of them.

    Args:
        clip: frames ``[T, H, W, 3]`` of the accelerated clip.
        reference: frames of the dense clip of the same prompt and seed.

    Raises:
        ValueError: if the shapes differ or a clip is no clip, see :func:`as_frames`.
    """
    a, b = as_pair(clip, reference)
    own = flicker(a)
    return Paired(psnr(a, b), psnr_clip(a, b), ssim(a, b), own, own - flicker(b))
