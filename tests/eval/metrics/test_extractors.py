"""The networks against the packages that their weights come from, and BRISQUE against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve
from scipy.special import gamma
from skimage import data

from dit_accel_eval.extractors import brisque, efficientnet, flow, rife

from .extracting import need


def astronaut() -> np.ndarray:
    return data.astronaut()[:256, 128:384]


def moving(frames: int, step: int, side: int = 128) -> np.ndarray:
    """A camera that pans by ``step`` pixels a frame."""
    picture = data.astronaut()
    return np.stack([picture[40 : 40 + side, 60 + i * step : 60 + i * step + side] for i in range(frames)])


def test_efficientnet_knows_its_pictures() -> None:
    """Class numbers of ImageNet: 285 Egyptian cat, 281 tabby, 282 tiger cat; 967 espresso."""
    need(efficientnet.NAME)
    net = efficientnet.FrameLogits(efficientnet.load())
    for picture, classes in ((data.chelsea(), {281, 282, 285}), (data.coffee(), {967})):
        planes = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None]
        with torch.inference_mode():
            assert int(net(planes).argmax()) in classes
            torch.testing.assert_close(net(planes), net(planes / 255), rtol=1e-4, atol=1e-3)


def test_efficientnet_is_the_published_architecture() -> None:
    net = efficientnet.EfficientNetLite0()
    assert sum(p.numel() for p in net.parameters()) == 4_652_008
    with torch.inference_mode():
        assert net.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 1280)


def test_same_padding() -> None:
    """TensorFlow pads the far side more where the padding is odd."""
    conv = efficientnet._Conv(1, 1, 3, 2, act=False).eval()
    conv[0].weight.data = torch.arange(9.0).view(1, 1, 3, 3)
    x = torch.rand(1, 1, 6, 7)
    want = torch.nn.functional.conv2d(torch.nn.functional.pad(x, (1, 1, 0, 1)), conv[0].weight, stride=2)
    with torch.inference_mode():
        torch.testing.assert_close(conv(x), want / (1 + 1e-3) ** 0.5)


def test_rife_finds_the_frame_between() -> None:
    need(rife.NAME)
    a, wanted, b = moving(3, 4)
    found = rife.middle(a, b)
    assert found.shape == a.shape
    error = np.abs(found.astype(float) - wanted).mean()
    average = np.abs((a.astype(float) + b) / 2 - wanted).mean()
    assert error < 0.25 * average
    assert np.abs(rife.middle(a, a).astype(int) - a).mean() < 1


def test_rife_widens_its_search_for_fast_motion(monkeypatch) -> None:
    """Where the second scale corrects by more than 32 pixels, all scales double."""
    used = []
    net = rife.Rife().eval()

    def block(self, x, flow, scale):
        used.append(scale)
        size = (len(x), 5, *x.shape[2:])
        made = torch.full(size, 40.0 if len(used) <= 2 else 0.0)
        return made[:, :4], made[:, 4:]

    monkeypatch.setattr(rife._FlowBlock, "forward", block)
    with torch.inference_mode():
        net(torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))
    assert used == [8, 4, 16, 8, 4, 2]


def test_flow_of_a_pan() -> None:
    if flow.missing():
        pytest.skip(str(flow.missing()))
    a, b = moving(2, 5)
    found = flow.opencv_flow(a, b)
    assert found.shape == (*a.shape[:2], 2)
    assert float(np.median(found[..., 0])) == pytest.approx(-5, abs=0.3)
    assert float(np.median(found[..., 1])) == pytest.approx(0, abs=0.3)


def test_brisque_features_by_hand() -> None:
    """Local normalisation and moments of one scale, written out."""
    frame = astronaut()
    grey = frame @ np.array([0.2125, 0.7154, 0.0721]) / 255
    axis = np.arange(-3, 4)
    kernel = np.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / (2 * (7 / 6) ** 2))
    kernel /= kernel.sum()
    mean = convolve(grey, kernel, mode="constant")
    deviation = np.sqrt(np.abs(convolve(grey**2, kernel, mode="constant") - mean**2))
    x = (grey - mean) / (deviation + 1 / 255)
    found = brisque.features(frame)
    assert found.shape == (36,)
    assert found[1] == pytest.approx(((x[x < 0] ** 2).mean() + (x[x >= 0] ** 2).mean()) / 2, rel=1e-6)
    product = x[:, :-1] * x[:, 1:]
    assert found[4] == pytest.approx((product[product < 0] ** 2).mean(), rel=1e-6)
    assert found[5] == pytest.approx((product[product >= 0] ** 2).mean(), rel=1e-6)


@pytest.mark.parametrize(("shape", "left", "right"), [(2.0, 1.0, 1.0), (1.0, 0.5, 0.5), (0.8, 1.0, 2.0)])
def test_brisque_fits_the_distribution_it_was_given(shape: float, left: float, right: float) -> None:
    """Samples of an asymmetric generalised Gaussian with known shape and spreads."""
    rng = np.random.default_rng(0)
    size = 400_000
    radius = rng.gamma(1 / shape, size=size) ** (1 / shape)
    norm = np.sqrt(gamma(1 / shape) / gamma(3 / shape))
    side = rng.random(size) < left / (left + right)
    x = np.where(side, -radius * left, radius * right) * norm
    found = brisque._fit(x)
    assert found[0] == pytest.approx(shape, rel=0.02)
    assert found[2] == pytest.approx(left**2, rel=0.03)
    assert found[3] == pytest.approx(right**2, rel=0.03)
    assert found[1] == pytest.approx(x.mean(), abs=0.02)


#: What the package brisque 0.2.0 and libsvm gave; it solves for the shape where we look it up in steps of 0.001.
BRISQUE = {"clean": -11.3533, "noisy": 52.5917, "blurred": 58.4324}


@pytest.mark.parametrize("kind", list(BRISQUE))
def test_brisque_equals_its_package(kind: str) -> None:
    need("brisque-svm", "brisque-range")
    import cv2

    frame = astronaut()
    if kind == "noisy":
        noise = np.random.default_rng(0).normal(0, 25, frame.shape)
        frame = np.clip(frame.astype(float) + noise, 0, 255).astype(np.uint8)
    elif kind == "blurred":
        frame = cv2.GaussianBlur(frame, (0, 0), 2)
    assert brisque.score(frame) == pytest.approx(BRISQUE[kind], abs=0.15)


def test_brisque_of_odd_frames() -> None:
    need("brisque-svm", "brisque-range")
    flat = np.full((40, 40, 3), 128, np.uint8)
    assert np.isfinite(brisque.score(flat))
    with pytest.raises(ValueError, match=r"at least 16 pixels a side, got \(8, 40\)"):
        brisque.features(flat[:8])
