"""BRISQUE: quality of a picture from its statistics alone (Mittal, Moorthy and Bovik, 2012); 0 is best, 100 worst.

Mean-subtracted, contrast-normalised luminance and the products of its neighbours are fitted with (asymmetric)
generalised Gaussians at two scales; 36 parameters go into a support vector regression.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from dit_accel_eval.extractors.cache import missing as not_cached
from dit_accel_eval.extractors.cache import read, read_plain

__all__ = ["MIN_SIDE", "NAME", "features", "missing", "score"]

NAME = "brisque-svm"
#: Smallest side whose half still holds the window.
MIN_SIDE = 16
Array = npt.NDArray[np.float64]
_SHAPES = np.arange(0.2, 10.001, 0.001)


def missing() -> str | None:
    """Why it cannot be used here, ``None`` if it can."""
    return not_cached(NAME) or not_cached("brisque-range")


@lru_cache(maxsize=1)
def _moment_ratios() -> Array:
    from scipy.special import gammaln

    ratios: Array = np.exp(2 * gammaln(2 / _SHAPES) - gammaln(1 / _SHAPES) - gammaln(3 / _SHAPES))
    return ratios


def _fit(x: Array) -> tuple[float, float, float, float]:
    """Shape, mean, left and right variance of an asymmetric generalised Gaussian, by matching moments."""
    from scipy.special import gamma

    left, right = x[x < 0], x[x >= 0]
    tiny = np.finfo(np.float64).tiny
    variance_left = float(np.mean(left**2)) if left.size else tiny
    variance_right = float(np.mean(right**2)) if right.size else tiny
    skew = np.sqrt(max(variance_left, tiny) / max(variance_right, tiny))
    ratio = np.mean(np.abs(x)) ** 2 / max(float(np.mean(x**2)), tiny)
    ratio *= (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    shape = float(_SHAPES[np.argmin((_moment_ratios() - ratio) ** 2)])
    spread = np.sqrt(gamma(1 / shape) / gamma(3 / shape)) * gamma(2 / shape) / gamma(1 / shape)
    return shape, float((np.sqrt(variance_right) - np.sqrt(variance_left)) * spread), variance_left, variance_right


def _normalised(grey: Array) -> Array:
    """Luminance minus its local mean, over its local deviation, in a Gaussian window of 7 with sigma 7/6."""
    import cv2

    def blur(x: Array) -> Array:
        blurred: Array = cv2.GaussianBlur(x, (7, 7), 7 / 6, borderType=cv2.BORDER_CONSTANT)
        return blurred

    mean = blur(grey)
    deviation = np.sqrt(np.abs(blur(grey * grey) - mean * mean))
    normalised: Array = (grey - mean) / (deviation + 1 / 255)
    return normalised


def features(frame: npt.NDArray[np.uint8]) -> Array:
    """The 36 parameters of an RGB frame ``[H, W, 3]``.

    Raises:
        ValueError: a side below 16 pixels.
    """
    import cv2

    if min(frame.shape[:2]) < MIN_SIDE:
        raise ValueError(f"BRISQUE needs frames of at least {MIN_SIDE} pixels a side, got {frame.shape[:2]}")
    grey: Array = frame.astype(np.float64) @ np.array([0.2125, 0.7154, 0.0721]) / 255
    found: list[float] = []
    for _ in range(2):
        x = _normalised(grey)
        shape, _mean, left, right = _fit(x)
        found += [shape, (left + right) / 2]
        for product in (x[:, :-1] * x[:, 1:], x[:-1] * x[1:], x[:-1, :-1] * x[1:, 1:], x[1:, :-1] * x[:-1, 1:]):
            found += _fit(product)
        grey = cv2.resize(grey, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_CUBIC)
    return np.array(found)


@lru_cache(maxsize=1)
def _model() -> tuple[Array, Array, float, float, Array, Array]:
    """Support vectors ``[N, 36]``, their coefficients, gamma, rho, and the ranges of the features."""
    header, _, body = read(NAME).decode("ascii").partition("SV\n")
    settings = dict(line.split(maxsplit=1) for line in header.splitlines())
    coefficients, vectors = [], []
    for line in body.splitlines():
        first, *rest = line.split()
        vector = np.zeros(36)
        for entry in rest:  # entries that are 0 are left out of the file
            index, _, value = entry.partition(":")
            vector[int(index) - 1] = float(value)
        coefficients.append(float(first))
        vectors.append(vector)
    ranges: dict[str, Any] = read_plain("brisque-range")
    low, high = (np.array(ranges[key], dtype=np.float64) for key in ("min_", "max_"))
    return np.stack(vectors), np.array(coefficients), float(settings["gamma"]), float(settings["rho"]), low, high


def score(frame: npt.NDArray[np.uint8]) -> float:
    """BRISQUE of an RGB frame ``[H, W, 3]``; lower is better, 0 to 100 on natural pictures but not bounded.

    Raises:
        MissingExtractorError: the model is not in the cache.
        ValueError: a side below 16 pixels.
    """
    vectors, coefficients, gamma, rho, low, high = _model()
    x = 2 * (features(frame) - low) / (high - low) - 1
    return float(coefficients @ np.exp(-gamma * np.square(vectors - x).sum(1)) - rho)
