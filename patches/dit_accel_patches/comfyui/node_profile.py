"""Nodes that load, save and find profiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dit_accel_patches.comfyui.calibration import calibrate
from dit_accel_patches.comfyui.node_accelerate import CATEGORY, PROFILE, method_inputs
from dit_accel_patches.comfyui.patching import session_of
from dit_accel_patches.comfyui.profile import Profile, folder, names
from dit_accel_patches.comfyui.sampling import Sampling, sampler_inputs
from dit_accel_patches.comfyui.settings import Settings

__all__ = ["Calibrate", "LoadProfile", "SaveProfile"]

_NONE = "(no profile saved yet)"


class LoadProfile:
    """A profile from ``models/dit_accel``."""

    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = (PROFILE,)
    RETURN_NAMES = ("profile",)
    DESCRIPTION = "Loads settings, and the plan of a calibration, from models/dit_accel."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs as ComfyUI wants them."""
        return {"required": {"name": (names() or [_NONE], {"tooltip": "A file of models/dit_accel, without .json."})}}

    @classmethod
    def IS_CHANGED(cls, name: str) -> float:
        """When the file last changed."""
        path = folder() / f"{name}.json"
        return path.stat().st_mtime if path.is_file() else -1.0

    def load(self, name: str) -> tuple[Profile]:
        """Load by name.

        Raises:
            ValueError: if there is none of that name, or the file is not a profile.
        """
        if name not in names():
            raise ValueError(f"no profile {name!r} in {folder()}; save one with Save Profile (dit_accel) and press R")
        return (Profile.load(folder() / f"{name}.json"),)


class SaveProfile:
    """Writes a profile, or the settings of an accelerated model."""

    CATEGORY = CATEGORY
    FUNCTION = "save"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("path",)
    DESCRIPTION = "Saves a calibrated profile, or the settings of an accelerated model, to models/dit_accel."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs as ComfyUI wants them."""
        return {
            "required": {
                "name": ("STRING", {"default": "my_model", "tooltip": "An older one of this name is replaced."})
            },
            "optional": {
                "profile": (PROFILE, {"tooltip": "From Calibrate (dit_accel)."}),
                "model": ("MODEL", {"tooltip": "From Accelerate Attention (dit_accel), instead of a profile."}),
            },
        }

    def save(self, name: str, profile: Profile | None = None, model: Any = None) -> dict[str, Any]:
        """Save to ``models/dit_accel/name.json``.

        Raises:
            ValueError: unless exactly one of profile and model is connected, or the name does not fit.
        """
        if (profile is None) == (model is None):
            raise ValueError(
                "connect either a profile or an accelerated model, not " + ("both" if profile else "neither")
            )
        if profile is None:
            session = session_of(model)
            profile = Profile(session.model, session.settings, session.plan)
        path: Path = profile.save(folder(), name)
        return {"ui": {"text": [f"{path}\n{profile}"]}, "result": (str(path),)}


class Calibrate:
    """Two dense samplings that make the plan of a static method."""

    CATEGORY = CATEGORY
    FUNCTION = "calibrate"
    RETURN_TYPES = (PROFILE,)
    RETURN_NAMES = ("profile",)
    DESCRIPTION = (
        "Samples twice densely and finds the token order of each head and the blocks that matter. The profile fits this "
        "model, size and text length; save it. Takes the time of two dense runs and somewhat more."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs as ComfyUI wants them."""
        return {"required": {"model": ("MODEL",), **method_inputs(static=True), **sampler_inputs()}}

    def calibrate(self, model: Any, method: str, quality: str, density: float, **sampling: Any) -> tuple[Profile]:
        """Calibrate for the given prompt, size and number of steps.

        Raises:
            ValueError: if the method needs no plan, or nothing could be watched.
        """
        # The plan fits one length, so that no sequence can be too short for it.
        settings = Settings(method=method, quality=quality, density=density, start_percent=0.0, min_tokens=0)
        return (calibrate(model, settings, Sampling(**sampling)),)
