"""Who is told how an evaluation goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dit_accel_eval.runs.settings import Sample

__all__ = ["Observer"]


class Observer:
    """Is told what happens; does nothing with it. Progress bars derive from it."""

    def begin(self, total: int, done: int) -> None:
        """The samples of this process are counted.

        Args:
            total: all of them.
            done: of them finished by an earlier run.
        """

    def sample(self, name: str, prompts: list[str]) -> None:
        """A pipeline call begins."""

    def step(self, done: int, steps: int | None) -> None:
        """A denoising step of that call is done."""

    def record(self, record: Mapping[str, Any], sample: Sample) -> None:
        """A sample is finished and kept."""

    def note(self, text: str) -> None:
        """Something worth a line."""
