"""LPIPS and shift-tolerant LPIPS: distances of normalised activations, weighted by channel.

LPIPS is arXiv 1801.03924, version 0.1; shift-tolerant LPIPS is arXiv 2207.13686. The trunks are written as lists of
layers, so that one class runs all four.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_accel_eval.extractors.cache import read_plain, read_tensors

__all__ = ["Lpips", "load"]

_CONV = ("conv", 1, 1)
_RELU = ("relu",)
_ALEX_TAIL = ((_CONV, _RELU), (_CONV, _RELU))
_MAX2 = ("max", 2, 2)
_BLURRED2 = (("max", 2, 1), ("blur",))
_BLURRED3 = (("max", 3, 1), ("blur",))
Layer = tuple[Any, ...]
Stages = tuple[tuple[Layer, ...], ...]

#: Layers between the activations that are compared: ``conv`` has stride and padding, ``max`` has side and stride.
STAGES: dict[str, Stages] = {
    "lpips-alex": (
        (("conv", 4, 2), _RELU),
        (("max", 3, 2), ("conv", 1, 2), _RELU),
        (("max", 3, 2), _CONV, _RELU),
        *_ALEX_TAIL,
    ),
    "lpips-vgg": (
        (_CONV, _RELU) * 2,
        (_MAX2, *(_CONV, _RELU) * 2),
        (_MAX2, *(_CONV, _RELU) * 3),
        (_MAX2, *(_CONV, _RELU) * 3),
        (_MAX2, *(_CONV, _RELU) * 3),
    ),
    "st-lpips-alex": (
        (("conv", 1, 2), ("blur",), _RELU),
        (*_BLURRED3, ("conv", 1, 2), _RELU),
        (*_BLURRED3, _CONV, _RELU),
        *_ALEX_TAIL,
    ),
    "st-lpips-vgg": (
        (_CONV, _RELU) * 2,
        (*_BLURRED2, *(_CONV, _RELU) * 2),
        (*_BLURRED2, *(_CONV, _RELU) * 3),
        (*_BLURRED2, *(_CONV, _RELU) * 3),
        (*_BLURRED2, *(_CONV, _RELU) * 3),
    ),
}


def _blur(x: Tensor) -> Tensor:
    """Binomial filter of three taps with stride 2, over a border of two mirrored pixels."""
    taps = x.new_tensor([0.25, 0.5, 0.25])
    kernel = (taps[:, None] * taps[None, :]).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])


class Lpips(nn.Module):
    """A perceptual distance of two batches of pictures.

    Args:
        stages: layers, see :data:`STAGES`.
        weights: of the convolutions, ``[out, in, k, k]``.
        biases: of the convolutions, ``[out]``.
        heads: weight of each channel by stage, ``[C]``.
    """

    def __init__(self, stages: Stages, weights: list[Tensor], biases: list[Tensor], heads: list[Tensor]) -> None:
        super().__init__()
        self.stages = stages
        for name, tensors in (("weight", weights), ("bias", biases), ("head", heads)):
            for index, tensor in enumerate(tensors):
                self.register_buffer(f"{name}{index}", tensor.float().contiguous())
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def features(self, pictures: Tensor) -> list[Tensor]:
        """Activations after each stage, each position normalised over channels."""
        x = (pictures - self.get_buffer("shift")) / self.get_buffer("scale")
        found, conv = [], 0
        for stage in self.stages:
            for kind, *options in stage:
                if kind == "conv":
                    stride, padding = options
                    x = F.conv2d(x, self.get_buffer(f"weight{conv}"), self.get_buffer(f"bias{conv}"), stride, padding)
                    conv += 1
                elif kind == "relu":
                    x = F.relu(x)
                elif kind == "max":
                    x = F.max_pool2d(x, *options)
                else:
                    x = _blur(x)
            found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def forward(self, a: Tensor, b: Tensor, *, spatial: bool = False) -> Tensor:
        """Distances of pairs.

        Args:
            a: ``[N, 3, H, W]`` in [-1, 1].
            b: like ``a``.
            spatial: enlarge each stage's map to the picture before the mean, as ``spatial=True`` of the lpips package.

        Returns:
            float32 ``[N]``.
        """
        total = a.new_zeros(len(a))
        for index, (x, y) in enumerate(zip(self.features(a), self.features(b))):
            head = self.get_buffer(f"head{index}").view(1, -1, 1, 1)
            distance = ((x - y).square() * head).sum(1, keepdim=True)
            if spatial:
                distance = F.interpolate(distance, size=a.shape[2:], mode="bilinear", align_corners=False)
            total = total + distance.mean((1, 2, 3))
        return total


def _flax(name: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Convolutions are stored as [k, k, in, out]."""
    tree = read_plain(name)
    trunk = tree["AlexNet_0" if name.endswith("alex") else "VGG16_0"]

    def tensor(array: Any) -> Tensor:
        return torch.from_numpy(np.array(array))

    layers = [trunk[f"Conv_{index}"] for index in range(len(trunk))]
    heads = [tensor(tree[f"NetLinLayer_{index}"]["Conv_0"]["kernel"]).flatten() for index in range(5)]
    return [tensor(c["kernel"]).permute(3, 2, 0, 1) for c in layers], [tensor(c["bias"]) for c in layers], heads


def _shift_tolerant(name: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    state = read_tensors(name)
    weights = [value for key, value in state.items() if key.startswith("net.") and key.endswith(".weight")]
    biases = [value for key, value in state.items() if key.startswith("net.") and key.endswith(".bias")]
    return weights, biases, [state[f"lin{index}.model.1.weight"].flatten() for index in range(5)]


@lru_cache(maxsize=4)
def load(name: str, device: str = "cpu") -> Lpips:
    """The network called ``name`` (a key of :data:`STAGES`), ready to measure.

    Raises:
        MissingExtractorError: the weights are not in the cache.
    """
    weights, biases, heads = _shift_tolerant(name) if name.startswith("st-") else _flax(name)
    return Lpips(STAGES[name], weights, biases, heads).eval().to(device)
