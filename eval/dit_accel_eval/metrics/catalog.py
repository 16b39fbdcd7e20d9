"""The paired metrics that ship and the presets that group them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dit_accel_eval.metrics import drift, perceptual, pixel, vmaf
from dit_accel_eval.metrics.registry import MetricRegistry, PairedMetric

__all__ = ["PRESETS", "REGISTRY"]

REGISTRY = MetricRegistry()


def _pixel(
    name: str,
    summary: str,
    convention: str,
    compute: Callable[[Tensor, Tensor], float],
    *,
    higher: bool = True,
    frames: int = 1,
    side: int = 1,
) -> None:
    REGISTRY.register(PairedMetric(name, summary, higher, None, convention, compute, min_frames=frames, min_side=side))


def _perceptual(name: str, summary: str, extractor: str, convention: str, **options: bool) -> None:
    def compute(a: Tensor, b: Tensor) -> float:
        return perceptual.distance(extractor, a, b, **options)

    REGISTRY.register(
        PairedMetric(
            name,
            summary,
            False,
            extractor,
            convention,
            compute,
            missing=lambda: perceptual.missing(extractor),
            min_side=perceptual.MIN_SIDE,
        )
    )


_pixel("psnr", "PSNR in dB", "each frame on [0, 1], mean over frames, identical frames count 100 dB", pixel.psnr)
_pixel("psnr_clip", "PSNR of the whole clip in dB", "one mean squared error for all frames", pixel.psnr_clip)
_pixel("ssim", "structural similarity", "Gaussian window 11, sigma 1.5, valid region", pixel.ssim, side=pixel.SSIM_SIDE)
_pixel(
    "ms_ssim",
    "multi-scale structural similarity",
    "five scales, Gaussian window 11, sigma 1.5; sides of at least 176 pixels",
    pixel.ms_ssim,
    side=pixel.MS_SSIM_SIDE,
)
_pixel(
    "temporal_difference",
    "error of the differences between neighbouring frames",
    "mean absolute, on [0, 1]",
    pixel.temporal_difference,
    higher=False,
    frames=2,
)
_pixel(
    "flicker_difference",
    "VBench temporal flickering of the clip minus that of the reference",
    "0 is best, above 0 is stiller than the reference; on [0, 1]",
    lambda a, b: pixel.flicker(a) - pixel.flicker(b),
    frames=2,
)
_perceptual("lpips_alex", "LPIPS 0.1, AlexNet", "lpips-alex", "input on [-1, 1], mean over positions and frames")
_perceptual("lpips_vgg", "LPIPS 0.1, VGG16", "lpips-vgg", "input on [-1, 1], mean over positions and frames")
_perceptual("st_lpips_alex", "shift-tolerant LPIPS, AlexNet", "st-lpips-alex", "input on [-1, 1], mean over frames")
_perceptual("st_lpips_vgg", "shift-tolerant LPIPS, VGG16", "st-lpips-vgg", "input on [-1, 1], mean over frames")
REGISTRY.register(
    PairedMetric(
        "vmaf",
        "VMAF, 0 to 100",
        True,
        vmaf.EXTRACTOR,
        "libvmaf's default model on raw frames, mean over frames, no codec in between",
        vmaf.vmaf,
        missing=vmaf.missing,
        min_side=vmaf.MIN_SIDE,
    )
)
REGISTRY.register(
    PairedMetric(
        "clip_drift",
        "relative distance of clip features (mean, spread and motion of frame features), FVD-style",
        False,
        drift.EXTRACTOR,
        "norm of the difference over the norm of the reference's features; not the published FVD",
        drift.clip_drift,
        missing=drift.missing,
    )
)

# The conventions of Sparse VideoGen (arXiv 2502.01776), svg/utils/metric.py, on raw frames instead of mp4 files.
_pixel("psnr@svg", "PSNR in dB", "as Sparse VideoGen: each frame on [0, 1], mean over frames", pixel.psnr)
_pixel("ssim@svg", "structural similarity", "as Sparse VideoGen: box window 11, zero padding", pixel.ssim_box)
_perceptual(
    "lpips@svg",
    "LPIPS 0.1, VGG16",
    "lpips-vgg",
    "as Sparse VideoGen: pictures fed on [0, 1] although the network expects [-1, 1]",
    rescale=False,
)
# The conventions of TeaCache (arXiv 2411.19108) and PAB, common_metrics, on raw frames instead of mp4 files.
_pixel(
    "psnr@teacache",
    "PSNR in dB",
    "as TeaCache: each frame on [0, 1], 100 dB where the squared error is below 1e-10, mean over frames",
    pixel.psnr,
)
_pixel(
    "ssim@teacache",
    "structural similarity",
    "as TeaCache: Gaussian window 11, sigma 1.5, valid region, each channel by itself",
    pixel.ssim,
    side=pixel.SSIM_SIDE,
)
_perceptual(
    "lpips@teacache",
    "LPIPS 0.1, AlexNet",
    "lpips-alex",
    "as TeaCache: input on [-1, 1], layers enlarged to the frame before the mean over positions",
    spatial=True,
)

#: Names of metrics by preset.
PRESETS: dict[str, tuple[str, ...]] = {
    "standard": (
        "psnr",
        "psnr_clip",
        "ssim",
        "ms_ssim",
        "lpips_alex",
        "lpips_vgg",
        "st_lpips_alex",
        "vmaf",
        "clip_drift",
        "temporal_difference",
        "flicker_difference",
    ),
    "quick": ("psnr", "psnr_clip", "ssim", "lpips_alex", "temporal_difference", "flicker_difference"),
    "svg": ("psnr@svg", "ssim@svg", "lpips@svg"),
    "teacache": ("psnr@teacache", "ssim@teacache", "lpips@teacache"),
}
