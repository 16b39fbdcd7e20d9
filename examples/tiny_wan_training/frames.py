"""All clips on the device at once, and windows cut from their loops."""

from __future__ import annotations

import numpy as np
import torch
from data import Clip


class FrameStore:
    """Every frame of every clip as one uint8 tensor; clips are endless loops."""

    def __init__(self, clips: list[Clip], device: torch.device) -> None:
        self.prompts = [clip.prompt for clip in clips]
        lengths = np.array([len(clip.frames) for clip in clips])
        flat = torch.from_numpy(np.concatenate([clip.frames for clip in clips]))
        self.frames = flat.to(device).permute(0, 3, 1, 2).contiguous()
        self.lengths = torch.from_numpy(lengths).to(device)
        self.offsets = torch.from_numpy(np.cumsum(lengths) - lengths).to(device)
        self.device = device

    def cut(self, clips: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
        """Windows as float (batch, 3, length, height, width) in [-1, 1]."""
        time = torch.arange(length, device=self.device)
        index = (starts[:, None] + time) % self.lengths[clips, None] + self.offsets[clips, None]
        windows = self.frames[index].float().div_(127.5).sub_(1.0)
        return windows.permute(0, 2, 1, 3, 4)

    def sample(self, batch: int, length: int) -> torch.Tensor:
        """Random windows of random clips."""
        clips = torch.randint(len(self.lengths), (batch,), device=self.device)
        starts = torch.rand(batch, device=self.device) * self.lengths[clips]
        return self.cut(clips, starts.long(), length)
