"""Metrics on pixels against implementations written independently of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter, uniform_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from dit_accel_eval import metrics


def clips(shape: tuple[int, ...] = (3, 40, 36, 3), noise: float = 12.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, shape[1])[None, :, None, None] * np.ones(shape)
    a = (ramp + rng.normal(0, 20, shape)).clip(0, 255).astype(np.uint8)
    b = (a + rng.normal(0, noise, shape)).clip(0, 255).astype(np.uint8)
    return a, b


def test_psnr_is_the_mean_over_frames() -> None:
    a, b = clips()
    want = np.mean([peak_signal_noise_ratio(y, x, data_range=255) for x, y in zip(a, b)])
    assert metrics.psnr(a, b) == pytest.approx(want, abs=1e-4)


def test_psnr_of_the_clip_pools_the_error() -> None:
    a, b = clips()
    b[0] = a[0]
    mse = np.mean((a.astype(float) - b) ** 2) / 255**2
    assert metrics.psnr_clip(a, b) == pytest.approx(-10 * math.log10(mse), abs=1e-4)
    assert metrics.psnr(a, b) > metrics.psnr_clip(a, b)


def test_ssim_equals_scikit_image() -> None:
    a, b = clips()
    want = np.mean(
        [
            structural_similarity(
                x, y, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
            )
            for x, y in zip(a, b)
        ]
    )
    assert metrics.ssim(a, b) == pytest.approx(want, abs=1e-8)


def test_box_ssim_is_the_formula_with_zeros_outside() -> None:
    a, b = clips()
    found = []
    for x, y in zip(a / 255.0, b / 255.0):

        def mean(z: np.ndarray) -> np.ndarray:
            return uniform_filter(z, size=(11, 11, 1), mode="constant")

        ux, uy = mean(x), mean(y)
        vx, vy, c = mean(x * x) - ux**2, mean(y * y) - uy**2, mean(x * y) - ux * uy
        top = (2 * ux * uy + 1e-4) * (2 * c + 9e-4)
        found.append((top / ((ux**2 + uy**2 + 1e-4) * (vx + vy + 9e-4))).mean())
    assert metrics.ssim_box(a, b) == pytest.approx(np.mean(found), abs=1e-6)
    assert metrics.ssim_box(a, b) != pytest.approx(metrics.ssim(a, b), abs=1e-3)  # why presets are named


def test_ms_ssim_is_the_product_over_five_scales() -> None:
    """Gaussian moments by scipy over the valid region, halved by averaging; the published weights."""
    a, b = clips((2, 192, 180, 3), noise=30)
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    values = []
    for x, y in zip(a / 255.0, b / 255.0):
        product = 1.0
        for scale, weight in enumerate(weights):

            def mean(z: np.ndarray) -> np.ndarray:
                return gaussian_filter(z, sigma=(1.5, 1.5, 0), truncate=5 / 1.5)[5:-5, 5:-5]

            ux, uy = mean(x), mean(y)
            vx, vy, c = mean(x * x) - ux**2, mean(y * y) - uy**2, mean(x * y) - ux * uy
            contrast = (2 * c + 9e-4) / (vx + vy + 9e-4)
            full = contrast * (2 * ux * uy + 1e-4) / (ux**2 + uy**2 + 1e-4)
            product *= max((full if scale == 4 else contrast).mean(), 0) ** weight
            x, y = (z[: len(z) // 2 * 2, : z.shape[1] // 2 * 2] for z in (x, y))
            x, y = (z.reshape(z.shape[0] // 2, 2, z.shape[1] // 2, 2, 3).mean((1, 3)) for z in (x, y))
        values.append(product)
    assert metrics.ms_ssim(a, b) == pytest.approx(np.mean(values), abs=1e-9)
    assert metrics.ms_ssim(a, a) == pytest.approx(1)
    theirs = multiscale_structural_similarity_index_measure(
        *(torch.from_numpy(z).permute(0, 3, 1, 2).double() / 255 for z in (a, b)), data_range=1.0
    )
    assert metrics.ms_ssim(a, b) == pytest.approx(float(theirs), abs=2e-3)  # its means take in mirrored borders


def test_flicker_is_vbenchs_formula() -> None:
    a, b = clips()
    differences = [np.abs(a[i].astype(float) - a[i + 1]).mean() for i in range(len(a) - 1)]
    assert metrics.flicker(a) == pytest.approx((255 - np.mean(differences)) / 255, abs=1e-6)
    still = np.repeat(a[:1], 4, axis=0)
    assert metrics.flicker(still) == 1
    assert metrics.flicker(still[:1]) == 1
    both = metrics.paired(b, a)
    assert both.flicker_difference == pytest.approx(metrics.flicker(b) - metrics.flicker(a), abs=1e-7)


def test_temporal_difference_sees_motion_only() -> None:
    a, b = clips()
    x, y = a / 255.0, b / 255.0
    want = np.abs(np.diff(x, axis=0) - np.diff(y, axis=0)).mean()
    assert metrics.temporal_difference(a, b) == pytest.approx(want, abs=1e-6)
    assert metrics.temporal_difference(x * 0.5 + 0.25, x * 0.5) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        metrics.temporal_difference(a[:1], b[:1])


def test_equal_clips() -> None:
    a, _ = clips()
    found = metrics.paired(a, a)
    assert (found.psnr, found.psnr_clip, found.flicker_difference) == (metrics.PSNR_CAP, metrics.PSNR_CAP, 0)
    assert found.ssim == pytest.approx(1)


def test_flat_regions_are_equal_to_themselves() -> None:
    """In single precision the variances of a flat bright region are noise, which SSIM's constants do not hide."""
    flat = np.full((2, 192, 192, 3), 231, np.uint8)
    flat[:, 50:90, 60:140] = (250, 3, 77)
    assert metrics.ssim(flat, flat) == pytest.approx(1, abs=1e-9)
    assert metrics.ms_ssim(flat, flat) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_uint8_and_float_agree(as_tensor: bool) -> None:
    a, b = clips()
    fa, fb = a / 255.0, b / 255.0
    if as_tensor:
        fa, fb = torch.from_numpy(fa), torch.from_numpy(fb)
    assert metrics.psnr(fa, fb) == pytest.approx(metrics.psnr(a, b), abs=1e-4)


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.psnr_clip, metrics.ssim, metrics.paired])
def test_errors_say_what_is_wrong(metric) -> None:
    a, b = clips()
    with pytest.raises(ValueError, match=r"one shape, got \(3, 40, 36, 3\) and \(2, 40, 36, 3\) \(3 and 2 frames\)"):
        metric(a, b[:2])
    broken = a / 255.0
    broken[1, 2, 3, 0] = np.nan
    with pytest.raises(ValueError, match="clip has 1 values that are NaN or infinite"):
        metric(broken, b)
    with pytest.raises(ValueError, match=r"reference must be frames \[T, H, W, 3\], got shape \(40, 36, 3\)"):
        metric(a, b[0])
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        metric(a.astype(np.float32), b)
    with pytest.raises(ValueError, match="must be uint8 or floating point"):
        metric(a.astype(np.int32), b)


def test_frames_smaller_than_the_window() -> None:
    a, b = clips((2, 8, 8, 3))
    with pytest.raises(ValueError, match="SSIM needs frames of at least 11 pixels"):
        metrics.ssim(a, b)
    a, b = clips((2, 175, 190, 3))
    with pytest.raises(ValueError, match="MS-SSIM needs frames of at least 176 pixels"):
        metrics.ms_ssim(a, b)


def test_ssim_looks_at_channels_by_themselves() -> None:
    """As TeaCache's: a swap of channels is seen although the luminance is the same."""
    a, _ = clips()
    swapped = a[..., ::-1].copy()
    want = np.mean(
        [metrics.ssim(np.repeat(a[..., c : c + 1], 3, -1), np.repeat(swapped[..., c : c + 1], 3, -1)) for c in range(3)]
    )
    assert metrics.ssim(a, swapped) == pytest.approx(want, abs=1e-6)
    assert F.mse_loss(torch.from_numpy(a).float(), torch.from_numpy(swapped).float()) > 0
