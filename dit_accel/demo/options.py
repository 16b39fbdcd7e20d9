"""What the demo is asked to do, checked before anything slow begins."""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from dit_accel.method import Method
from dit_accel.policy import Policy
from dit_accel.presets import get_method

__all__ = ["DEFAULT_PROMPT", "DemoError", "DemoOptions"]

DEFAULT_PROMPT = "octopus"
_LATENT_FRAMES = {"cpu": 17, "cuda": 33}
_STEPS = {"cpu": 12, "cuda": 30}
_SIDE = 128


class DemoError(ValueError):
    """The demo cannot do what it was asked; the message is one line for the user."""


@dataclass(frozen=True)
class DemoOptions:
    """Options of the demo; ``None`` takes what suits the device.

    Attributes:
        method: method name.
        density: share of blocks computed on a sparse step; ``None`` is the method's own.
        run_density: work over dense work of the whole run; instead of ``density``.
        prompt: what to generate.
        steps: denoising steps.
        seed: of the noise.
        frames: frames of the clip.
        guidance: scale of classifier-free guidance.
        size: height and width in pixels.
        out: folder to write to.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        model: folder of a diffusers pipeline; ``None`` is the one in the repository.
        video: whether to write clips.
    """

    method: str = "auto"
    density: float | None = None
    run_density: float | None = None
    prompt: str = DEFAULT_PROMPT
    steps: int | None = None
    seed: int = 0
    frames: int | None = None
    guidance: float = 4.0
    size: tuple[int, int] = (_SIDE, _SIDE)
    out: Path = Path("demo")
    device: str = "auto"
    model: Path | None = None
    video: bool = True

    def resolved_device(self) -> torch.device:
        """The device to run on.

        Raises:
            DemoError: unknown, or torch does not see one.
        """
        if self.device not in ("auto", "cpu", "cuda"):
            raise DemoError(f"device must be auto, cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise DemoError("device cuda was asked for, but torch sees no GPU; use --device cpu")
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    def resolved_steps(self) -> int:
        """Denoising steps."""
        return _STEPS[self.resolved_device().type] if self.steps is None else self.steps

    def resolved_frames(self, temporal: int) -> int:
        """Frames of the clip for a VAE that makes one latent frame of ``temporal`` frames.

        Raises:
            DemoError: if they do not fit.
        """
        if self.frames is None:
            return (_LATENT_FRAMES[self.resolved_device().type] - 1) * temporal + 1
        if (self.frames - 1) % temporal:
            below = (self.frames - 1) // temporal * temporal + 1
            raise DemoError(
                f"frames must be 1 + a multiple of {temporal} for this model, got {self.frames}; "
                f"{below} and {below + temporal} fit"
            )
        return self.frames

    def chosen(self) -> Method:
        """The method with its density.

        Raises:
            DemoError: unknown method, or a density that it cannot have.
        """
        if self.density is not None and self.run_density is not None:
            raise DemoError("give either density (of a sparse step) or run-density (of the whole run), not both")
        if self.run_density is not None and not 0 < self.run_density <= 1:
            raise DemoError(f"run-density must be above 0 and at most 1, got {self.run_density:g}")
        try:
            method = get_method(self.method)
            # A static method has no warm-up: all its steps have one density.
            density = self.run_density if method.static and self.run_density is not None else self.density
            if density is not None:
                method = method.replace(density=density)
            if self.run_density is not None and not method.static and not method.is_dense:
                Policy(method).sparse_density(self.run_density, self.resolved_steps())
        except ValueError as error:
            raise DemoError(str(error)) from None
        return method

    def model_folder(self) -> Path:
        """Folder of the pipeline.

        Raises:
            DemoError: if there is none.
        """
        here = Path(__file__).resolve().parents[2] / "examples" / "tiny_wan"
        places = [self.model] if self.model is not None else [here, Path.cwd() / "examples" / "tiny_wan"]
        for place in places:
            if (place / "model_index.json").is_file():
                return place
        if self.model is not None:
            raise DemoError(f"no diffusers pipeline at {self.model}: it has no model_index.json")
        raise DemoError(
            f"the tiny Wan pipeline is not at {here}; it ships in the repository, so run this from a clone, "
            "train it with examples/tiny_wan_training, or give --model FOLDER"
        )

    def _check_libraries(self) -> None:
        """Say what is missing before minutes are spent, not when the clips are written."""
        needed = ["diffusers", "matplotlib", *(["imageio_ffmpeg"] if self.video else [])]
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            raise DemoError(f"the demo needs {', '.join(missing)}: pip install 'dit-accel[diffusers,eval]'")

    def check(self) -> None:
        """Check everything that can be checked without the model.

        Raises:
            DemoError: naming the first thing that is wrong.
        """
        self.resolved_device()
        self.chosen()
        self._check_libraries()
        for name in ("steps", "frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DemoError(f"{name} must be at least 1, got {value}")
        if not self.prompt.strip():
            raise DemoError("prompt must not be empty")
        if any(side < 16 or side % 16 for side in self.size):
            raise DemoError(f"size must be multiples of 16 pixels, got {self.size[0]}x{self.size[1]}")
        self.model_folder()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.out):
                pass
        except OSError as error:
            raise DemoError(f"cannot write to {self.out}: {error.strerror or error}") from None
