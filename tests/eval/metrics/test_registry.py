"""Names, presets, availability and errors of the paired metrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dit_accel_eval import extractors, metrics
from dit_accel_eval.metrics import MetricRegistry, PairedMetric, vmaf


def pair(frames: int = 3, side: int = 64) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a = np.tile(np.linspace(0, 255, side)[None, :, None, None], (frames, 1, side, 3)).astype(np.uint8)
    return (a + rng.normal(0, 9, a.shape)).clip(0, 255).astype(np.uint8), a


def test_every_metric_says_what_it_is() -> None:
    assert set(metrics.PRESETS) == {"standard", "quick", "svg", "teacache"}
    assert set(metrics.PRESETS["quick"]) < set(metrics.PRESETS["standard"])
    for name, metric in metrics.REGISTRY.items():
        assert metric.name == name
        assert metric.summary
        assert metric.convention
        assert metric.extractor is None or metric.extractor in (*extractors.WEIGHTS, vmaf.EXTRACTOR)
    for preset, names in metrics.PRESETS.items():
        assert all(name in metrics.REGISTRY for name in names)
        assert preset in ("standard", "quick") or all(name.endswith(f"@{preset}") for name in names)


def test_pixel_metrics_need_nothing() -> None:
    clip, reference = pair()
    names = ["psnr", "psnr_clip", "ssim", "temporal_difference", "flicker_difference", "ssim@svg", "ssim@teacache"]
    assert all(metrics.available(name) is None for name in names)
    found = metrics.evaluate_pair(clip, reference, names)
    assert list(found) == names
    assert found["psnr"] == metrics.psnr(clip, reference)
    assert found["ssim@svg"] == metrics.ssim_box(clip, reference)
    assert found["ssim@teacache"] == found["ssim"] == metrics.ssim(clip, reference)
    assert found["flicker_difference"] < 0 < found["temporal_difference"]


def test_devices_and_tensors() -> None:
    clip, reference = pair()
    want = metrics.evaluate_pair(clip, reference, ["psnr", "ssim"])
    assert metrics.evaluate_pair(torch.from_numpy(clip), reference, ["psnr", "ssim"], device="cpu") == want


def test_what_a_shape_does_not_allow_is_left_out() -> None:
    clip, reference = pair(frames=1)
    found = metrics.evaluate_pair(clip, reference, ["psnr", "ms_ssim", "temporal_difference", "flicker_difference"])
    assert list(found) == ["psnr"]
    assert (
        metrics.inapplicable("temporal_difference", clip.shape) == "temporal_difference needs at least 2 frames, got 1"
    )
    assert "at least 176 pixels a side" in str(metrics.inapplicable("ms_ssim", clip.shape))
    assert metrics.inapplicable("psnr", clip.shape) is None


def test_errors_name_the_clip() -> None:
    clip, reference = pair()
    with pytest.raises(ValueError, match=r"fast\.mp4 and dense\.mp4 must have one shape, .*\(3 and 2 frames\)"):
        metrics.evaluate_pair(clip, reference[:2], ["psnr"], labels=("fast.mp4", "dense.mp4"))
    broken = clip / 255.0
    broken[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"fast\.mp4 has 3 values that are NaN"):
        metrics.evaluate_pair(broken, reference, ["psnr"], labels=("fast.mp4", "dense.mp4"))
    with pytest.raises(ValueError, match=r"metric must be one of .*, got 'psnrr'; did you mean 'psnr'\?"):
        metrics.evaluate_pair(clip, reference, ["psnrr"])
    with pytest.raises(ValueError, match="metric must be one of"):
        metrics.available("nonsense")


def test_missing_weights_are_an_error_with_the_way_out(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DIT_ACCEL_EVAL_CACHE", str(tmp_path))
    reason = metrics.available("lpips_alex")
    assert reason is not None
    assert "dit-accel eval setup" in reason
    assert str(tmp_path) in reason
    with pytest.raises(ValueError, match="metric 'lpips_alex' cannot be used: the weights 'lpips-alex' are not at"):
        metrics.evaluate_pair(*pair(), ["lpips_alex"])


def test_others_may_register() -> None:
    registry = MetricRegistry()
    registry.register(PairedMetric("mean", "mean", True, None, "none", lambda a, b: float((a - b).mean())))
    assert registry.names() == ["mean"]
    with pytest.raises(ValueError, match="'mean' is registered already"):
        registry.register(registry["mean"])


@pytest.mark.skipif(vmaf.missing() is not None, reason=str(vmaf.missing()))
def test_vmaf_orders_distortions() -> None:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (3, 12, 13, 3)).astype(np.uint8)
    reference = small.repeat(8, 1).repeat(8, 2)[:, :90, :101]  # odd sides
    blurred = (reference.astype(float) + np.roll(reference, 3, 1) + np.roll(reference, 3, 2)).astype(float) / 3
    same = metrics.evaluate_pair(reference, reference, ["vmaf"])["vmaf"]
    worse = metrics.evaluate_pair(blurred.astype(np.uint8), reference, ["vmaf"])["vmaf"]
    assert 95 < same <= 100
    assert worse < same - 10


def test_vmaf_without_libvmaf_says_so(monkeypatch) -> None:
    vmaf._ffmpeg.cache_clear()
    monkeypatch.setattr(vmaf, "_candidates", lambda: ["/nowhere/ffmpeg"])
    try:
        assert "no ffmpeg with libvmaf among /nowhere/ffmpeg" in str(metrics.available("vmaf"))
        with pytest.raises(ValueError, match="'vmaf' cannot be used"):
            metrics.evaluate_pair(*pair(), ["vmaf"])
    finally:
        vmaf._ffmpeg.cache_clear()
