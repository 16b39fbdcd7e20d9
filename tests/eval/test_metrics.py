"""Paired metrics against formulas written independently of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

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
    assert metrics.ssim(a, b) == pytest.approx(want, abs=2e-4)


def test_flicker_is_vbenchs_formula() -> None:
    a, b = clips()
    differences = [np.abs(a[i].astype(float) - a[i + 1]).mean() for i in range(len(a) - 1)]
    assert metrics.flicker(a) == pytest.approx((255 - np.mean(differences)) / 255, abs=1e-6)
    still = np.repeat(a[:1], 4, axis=0)
    assert metrics.flicker(still) == 1
    assert metrics.flicker(still[:1]) == 1
    both = metrics.paired(b, a)
    assert both.flicker_difference == pytest.approx(metrics.flicker(b) - metrics.flicker(a), abs=1e-7)


def test_equal_clips() -> None:
    a, _ = clips()
    found = metrics.paired(a, a)
    assert (found.psnr, found.psnr_clip, found.flicker_difference) == (metrics.PSNR_CAP, metrics.PSNR_CAP, 0)
    assert found.ssim == pytest.approx(1)


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
    with pytest.raises(ValueError, match=r"one shape, got \(3, 40, 36, 3\) and \(2, 40, 36, 3\)"):
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


def test_ssim_of_frames_smaller_than_its_window() -> None:
    a, b = clips((2, 8, 8, 3))
    with pytest.raises(ValueError, match="at least 11 pixels"):
        metrics.ssim(a, b)
