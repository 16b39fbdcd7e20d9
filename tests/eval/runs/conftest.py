"""A pipeline that needs no model, and the small real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dit_accel_eval.compare import Configuration
from dit_accel_eval.runs import EvalOptions

ROOT = Path(__file__).resolve().parents[3]


class FakePipe:
    """Clips that follow from the noise alone; knows what an evaluation asks of a pipeline."""

    def __init__(self) -> None:
        self.transformer = torch.nn.Linear(2, 2)
        self.scheduler = SimpleNamespace(timesteps=[0, 1])
        self._execution_device = torch.device("cpu")
        self.calls: list[tuple[str, ...]] = []
        self.bad: set[tuple[str, int]] = set()
        self.weights = 1.0
        torch.nn.init.constant_(self.transformer.weight, self.weights)
        torch.nn.init.constant_(self.transformer.bias, 0.0)

    def __call__(
        self,
        prompt: list[str],
        generator: list[torch.Generator],
        callback_on_step_end: Any = None,
        output_type: str = "np",
        num_inference_steps: int = 2,
        num_frames: int = 4,
    ) -> Any:
        self.calls.append(tuple(prompt))
        for step in range(2):
            self.transformer(torch.zeros(2))
            callback_on_step_end(self, step, None, {})
        clips = [torch.rand(num_frames, 16, 16, 3, generator=g).numpy() for g in generator]
        for clip, text, noise in zip(clips, prompt, generator):
            if (text, noise.initial_seed()) in self.bad:
                clip[0, 0, 0, 0] = np.nan
        return SimpleNamespace(frames=np.stack(clips))


@pytest.fixture
def make_pipe() -> type[FakePipe]:
    return FakePipe


@pytest.fixture
def fake_options() -> Callable[..., EvalOptions]:
    """Options of a run with two dense rows, which need no engine."""

    def make(**changes: Any) -> EvalOptions:
        rows = [Configuration("same"), Configuration("another seed", seed_offset=1000)]
        return EvalOptions(**{"configurations": rows, "metrics": ["psnr", "ssim"], "frames": 4, "steps": 2, **changes})

    return make


@pytest.fixture(scope="session")
def tiny_wan() -> Any:
    """The trained pipeline of the repository, on the CPU."""
    pytest.importorskip("diffusers")
    from dit_accel_eval.runs.pipeline import load_pipeline

    return load_pipeline(ROOT / "examples/tiny_wan", torch.device("cpu"))


@pytest.fixture
def small_call() -> dict[str, Any]:
    return {"num_frames": 9, "height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 4.0}
