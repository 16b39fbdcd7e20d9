"""EfficientNet-Lite0: an ImageNet classifier with 1280 features, used where the usual extractors cannot be had.

arXiv 1905.11946, in the variant without squeeze-and-excitation and with ReLU6. Pictures are seen at 224 × 224 as
``(x - 127) / 128`` for x in 0..255.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_accel_eval.extractors.cache import read_tensors

__all__ = ["NAME", "EfficientNetLite0", "FrameFeatures", "FrameLogits", "load"]

NAME = "efficientnet-lite0"
_SIDE = 224
#: Repeats, kernel side, stride, expansion and channels of each group of blocks.
_GROUPS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class _Conv(nn.Sequential):
    """Convolution padded as TensorFlow's "same", batch norm and, unless told not to, ReLU6."""

    def __init__(self, inputs: int, outputs: int, side: int, stride: int, groups: int = 1, act: bool = True) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, side, stride, groups=groups, bias=False), nn.BatchNorm2d(outputs, eps=1e-3)
        )
        self.side, self.stride, self.act = side, stride, act

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size in (x.shape[3], x.shape[2]):
            whole = max((-(-size // self.stride) - 1) * self.stride + self.side - size, 0)
            pads += [whole // 2, whole - whole // 2]
        x = self[1](self[0](F.pad(x, pads)))
        return F.relu6(x) if self.act else x


class _Block(nn.Sequential):
    """Inverted bottleneck."""

    def __init__(self, inputs: int, outputs: int, side: int, stride: int, expansion: int) -> None:
        wide = inputs * expansion
        first = [_Conv(inputs, wide, 1, 1)] if expansion > 1 else []
        super().__init__(*first, _Conv(wide, wide, side, stride, groups=wide), _Conv(wide, outputs, 1, 1, act=False))
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self:
            y = layer(y)
        return x + y if self.skip else y


class EfficientNetLite0(nn.Module):
    """The classifier; ``forward`` takes ``[N, 3, 224, 224]`` and gives 1280 pooled features."""

    def __init__(self) -> None:
        super().__init__()
        blocks, inputs = [], 32
        for repeats, side, stride, expansion, outputs in _GROUPS:
            for index in range(repeats):
                blocks.append(_Block(inputs, outputs, side, stride if index == 0 else 1, expansion))
                inputs = outputs
        self.layers = nn.Sequential(_Conv(3, 32, 3, 2), *blocks, _Conv(inputs, 1280, 1, 1))
        self.head = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[N, 1280]`` of pictures ``[N, 3, 224, 224]``."""
        pooled: Tensor = self.layers(x).mean((2, 3))
        return pooled


class FrameFeatures(nn.Module):
    """From frames to features, in the form that torchmetrics wants of an extractor."""

    num_features = 1280

    def __init__(self, net: EfficientNetLite0) -> None:
        super().__init__()
        self.net = net

    def forward(self, frames: Tensor) -> Tensor:
        """Features of frames.

        Args:
            frames: ``[N, 3, H, W]``, uint8, or floating point in [0, 1].

        Returns:
            float32 ``[N, 1280]``.
        """
        x = frames.float() if frames.dtype == torch.uint8 else frames.float() * 255
        x = F.interpolate(x, size=(_SIDE, _SIDE), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        found: Tensor = self.net((x - 127) / 128)
        return found


class FrameLogits(nn.Module):
    """From frames to the 1000 logits of ImageNet's classes, for the Inception Score."""

    num_features = 1000

    def __init__(self, features: FrameFeatures) -> None:
        super().__init__()
        self.features = features

    def forward(self, frames: Tensor) -> Tensor:
        """Logits ``[N, 1000]`` of frames as :class:`FrameFeatures` takes them."""
        found: Tensor = self.features.net.head(self.features(frames))
        return found


@lru_cache(maxsize=2)
def load(device: str = "cpu") -> FrameFeatures:
    """The pinned classifier.

    Raises:
        MissingExtractorError: the weights are not in the cache.
    """
    net = EfficientNetLite0()
    # Both lists are in the order of the layers; the names of the file are those of another implementation.
    net.load_state_dict(dict(zip(net.state_dict(), read_tensors(NAME).values(), strict=True)))
    return FrameFeatures(net).eval().requires_grad_(False).to(device)
