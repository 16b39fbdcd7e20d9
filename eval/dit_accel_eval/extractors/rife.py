"""RIFE 3.9: the frame between two frames (arXiv 2011.06294), used for motion smoothness in place of AMT."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_accel_eval.extractors.cache import read_tensors

__all__ = ["NAME", "Rife", "load", "middle"]

NAME = "rife-3.9"
#: Frames are padded to multiples of this, so that the coarsest scale divides them.
_MULTIPLE = 128
_FAR = 32


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.PReLU(outputs))


def _resize(x: Tensor, factor: float) -> Tensor:
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False, recompute_scale_factor=False)


class _FlowBlock(nn.Module):
    """Refines the flow to both frames and the mask that blends them, at one scale."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv0 = nn.Sequential(_conv(inputs, width // 2, 2), _conv(width // 2, width, 2))
        self.convblock = nn.Sequential(*[_conv(width, width) for _ in range(8)])
        self.lastconv = nn.ConvTranspose2d(width, 5, 4, 2, 1)

    def forward(self, x: Tensor, flow: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        x = _resize(x, 1 / scale)
        if flow is not None:
            x = torch.cat((x, _resize(flow, 1 / scale) / scale), 1)
        x = self.conv0(x)
        x = _resize(self.lastconv(self.convblock(x) + x), scale * 2)
        return x[:, :4] * scale * 2, x[:, 4:5]


def _warp(frame: Tensor, flow: Tensor) -> Tensor:
    """Take each pixel from where ``flow`` ``[N, 2, H, W]`` (x, y in pixels) points, clamped at the border."""
    height, width = frame.shape[2:]
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height, device=frame.device),
        torch.linspace(-1, 1, width, device=frame.device),
        indexing="ij",
    )
    grid = torch.stack((x + flow[:, 0] * 2 / (width - 1), y + flow[:, 1] * 2 / (height - 1)), -1)
    return F.grid_sample(frame, grid, mode="bilinear", padding_mode="border", align_corners=True)


class Rife(nn.Module):
    """Four scales of flow, coarse to fine."""

    def __init__(self) -> None:
        super().__init__()
        self.block0 = _FlowBlock(7, 192)
        self.block1 = _FlowBlock(12, 128)
        self.block2 = _FlowBlock(12, 96)
        self.block3 = _FlowBlock(12, 64)

    def _run(self, a: Tensor, b: Tensor, scales: tuple[float, ...], check: bool) -> Tensor | None:
        """The middle frame, or ``None`` if the motion turns out too large for these scales."""
        time = torch.full_like(a[:, :1], 0.5)
        flow, mask = self.block0(torch.cat((a, b, time), 1), None, scales[0])
        for index, block in enumerate((self.block1, self.block2, self.block3), 1):
            warped = torch.cat((_warp(a, flow[:, :2]), _warp(b, flow[:, 2:])), 1)
            change, change_mask = block(torch.cat((warped, time, mask), 1), flow, scales[index])
            if check and index == 1 and change[:, :2].abs().max() > _FAR and change[:, 2:].abs().max() > _FAR:
                return None
            flow, mask = flow + change, mask + change_mask
        blend = torch.sigmoid(mask)
        return _warp(a, flow[:, :2]) * blend + _warp(b, flow[:, 2:]) * (1 - blend)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The frame halfway between two.

        Args:
            a: ``[N, 3, H, W]`` in [0, 1], sides multiples of 128.
            b: like ``a``.

        Returns:
            Like ``a``.
        """
        found = self._run(a, b, (8, 4, 2, 1), True)
        if found is None:
            found = self._run(a, b, (16, 8, 4, 2), False)
        assert found is not None
        return found


@lru_cache(maxsize=2)
def load(device: str = "cpu") -> Rife:
    """The pinned interpolator.

    Raises:
        MissingExtractorError: the weights are not in the cache.
    """
    net = Rife()
    state = {key.removeprefix("module."): value for key, value in read_tensors(NAME).items()}
    wanted = set(net.state_dict())  # the file also holds a teacher and a refinement that this version leaves out
    net.load_state_dict({key: value for key, value in state.items() if key in wanted})
    return net.eval().requires_grad_(False).to(device)


def middle(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8], device: str = "cpu") -> npt.NDArray[np.uint8]:
    """The frame halfway between two uint8 frames ``[H, W, 3]``, rounded to uint8."""
    height, width = a.shape[:2]
    x = torch.from_numpy(np.stack([a, b])).to(device).permute(0, 3, 1, 2).float() / 255
    x = F.pad(x, (0, -width % _MULTIPLE, 0, -height % _MULTIPLE), mode="replicate")
    with torch.inference_mode():
        found = load(device)(x[:1], x[1:])[0, :, :height, :width]
    frame: npt.NDArray[np.uint8] = (found.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return frame
