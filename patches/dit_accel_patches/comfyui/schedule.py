"""Steps and the dense window, from the sigmas of ComfyUI's sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dit_accel.adapter import StepInfo

__all__ = ["Schedule", "Window", "sigma_of"]

# Sigmas reach the model in float32 or less and through a division or two.
_SAME = 1e-4


@dataclass(frozen=True)
class Window:
    """Sigmas between which attention may be sparse: ``start >= sigma >= end``.

    Attributes:
        start: sigma at the start percent.
        end: sigma at the end percent.
    """

    start: float
    end: float

    @classmethod
    def of(cls, sampling: Any, start_percent: float, end_percent: float) -> Window:
        """The window of two percents, as the model's sampling maps them to sigmas."""
        return cls(float(sampling.percent_to_sigma(start_percent)), float(sampling.percent_to_sigma(end_percent)))


@dataclass(frozen=True)
class Schedule:
    """The sigmas of one run, from noise to picture; the last one is where it ends.

    Attributes:
        sigmas: one more than there are steps.
    """

    sigmas: tuple[float, ...]

    @classmethod
    def read(cls, sample_sigmas: Any) -> Schedule | None:
        """The schedule of ``transformer_options["sample_sigmas"]``. Waits for the device; once a run."""
        if not isinstance(sample_sigmas, Tensor) or sample_sigmas.numel() < 2:
            return None
        return cls(tuple(float(value) for value in sample_sigmas.detach().flatten().cpu()))

    @property
    def steps(self) -> int:
        """Number of denoising steps."""
        return len(self.sigmas) - 1

    def step(self, sigma: float) -> int:
        """The step that evaluates the model at ``sigma``: samplers of higher order do so between two steps, too."""
        tolerance = _SAME * max(abs(sigma), 1e-3)
        behind = sum(value >= sigma - tolerance for value in self.sigmas[:-1])
        return max(behind - 1, 0)

    def shares(self, window: Window) -> tuple[float, float]:
        """The window as shares of the steps: what is dense at the start, and where sparse steps end."""
        steps = self.sigmas[:-1]
        first = sum(value > window.start * (1 + _SAME) for value in steps)
        last = sum(value >= window.end * (1 - _SAME) for value in steps)
        return first / self.steps, max(first, last) / self.steps

    def info(self, sigma: float, branch: str) -> StepInfo:
        """Where a call at ``sigma`` stands."""
        step = self.step(sigma)
        return StepInfo(step, self.steps, step / self.steps, branch, sigma, "scheduler")


def sigma_of(options: Any) -> float | None:
    """The sigma of a forward call. Waits for the device."""
    sigmas = options.get("sigmas")
    if isinstance(sigmas, Tensor) and sigmas.numel():
        return float(sigmas.detach().flatten()[0])
    return None
