"""Finding the static plan of a model by two dense samplings, as :func:`dit_accel.calibrate` does for pipelines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dit_accel.static_plan import Recorder
from dit_accel_patches.comfyui.patching import accelerate, session_of
from dit_accel_patches.comfyui.profile import Profile
from dit_accel_patches.comfyui.sampling import Sampling
from dit_accel_patches.comfyui.settings import Settings

__all__ = ["calibrate"]


def calibrate(model: Any, settings: Settings, sampling: Sampling) -> Profile:
    """Sample twice densely: the first run finds the token order of each head, the second the mass of each block.

    Raises:
        ValueError: the method needs no plan, the model is not known, or no attention could be watched.
    """
    method = settings.build()
    if not method.static:
        raise ValueError(
            f"method {settings.method!r} plans while it runs and needs no calibration; choose a static one such as 'paro'"
        )
    recorder = Recorder(method)
    watched = accelerate(model, replace(settings, start_percent=0.0, end_percent=1.0), recorder=recorder)
    session = session_of(watched)
    sampling(watched)
    recorder.next_phase()
    sampling(watched)
    run = session.recorded
    if run is None:
        told = "; ".join(reason for status in session.status() for reason in status.reasons)
        raise ValueError(f"calibration saw no self-attention of {session.model}" + (f": {told}" if told else ""))
    plan = recorder.finish(run)
    return Profile(session.model, settings, plan)
