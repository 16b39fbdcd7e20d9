"""VBench-style dimensions (arXiv 2311.17982) of a clip, with the official extractors or with ones that packages carry.

The formulas are VBench's either way; the numbers are only under the profile ``official``. Only there may scores be
normalised and added up (:func:`totals`). :func:`extractor` names what a number was seen through.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dit_accel_eval.metrics.frames import as_uint8
from dit_accel_eval.vbench import formulas, official, offline
from dit_accel_eval.vbench.formulas import Frames
from dit_accel_eval.vbench.slots import Slot
from dit_accel_eval.vbench.suite import SuitePrompt, load_prompts, totals

__all__ = [
    "DIMENSIONS",
    "PROFILES",
    "Dimension",
    "SuitePrompt",
    "available",
    "evaluate",
    "extractor",
    "load_prompts",
    "totals",
]

#: Extractors of each profile by dimension.
PROFILES: dict[str, dict[str, Slot]] = {"offline": offline.SLOTS, "official": official.SLOTS}


@dataclass(frozen=True)
class Dimension:
    """One thing that VBench looks at. All are better the higher, and none means much alone: a frozen clip leads in four.

    Attributes:
        name: VBench's name.
        summary: what it is, one line.
        score: from frames, the extractor, the prompt and frames a second to the number.
        min_frames: fewest frames for which it is defined.
        needs_prompt: whether it compares with the prompt.
        needs_extractor: whether it looks through a network or tool.
    """

    name: str
    summary: str
    score: Callable[[Frames, Any, str, float], float]
    min_frames: int = 2
    needs_prompt: bool = False
    needs_extractor: bool = True


_ALL = (
    Dimension("subject_consistency", "likeness of frames", lambda v, f, p, r: formulas.consistency(f(v))),
    Dimension("background_consistency", "likeness of frames as wholes", lambda v, f, p, r: formulas.consistency(f(v))),
    Dimension(
        "temporal_flickering",
        "closeness of neighbouring frames",
        lambda v, f, p, r: formulas.temporal_flickering(v),
        needs_extractor=False,
    ),
    Dimension(
        "motion_smoothness", "how well frames are interpolated", lambda v, f, p, r: formulas.motion_smoothness(v, f), 3
    ),
    Dimension("dynamic_degree", "1 if the clip moves, else 0", lambda v, f, p, r: formulas.dynamic_degree(v, f, fps=r)),
    Dimension("aesthetic_quality", "how much people like the frames", lambda v, f, p, r: f(v) / 10, 1),
    Dimension("imaging_quality", "freedom from noise and blur", lambda v, f, p, r: f(v) / 100, 1),
    Dimension("overall_consistency", "likeness to the prompt", lambda v, f, p, r: f(v, p), 1, needs_prompt=True),
)

#: Dimensions by name.
DIMENSIONS: dict[str, Dimension] = {dimension.name: dimension for dimension in _ALL}


def _dimension(name: str) -> Dimension:
    if name in DIMENSIONS:
        return DIMENSIONS[name]
    close = difflib.get_close_matches(name, DIMENSIONS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"dimension must be one of {', '.join(DIMENSIONS)}, got {name!r}{hint}")


def _slot(dimension: Dimension, profile: str) -> Slot | None:
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}")
    return PROFILES[profile][dimension.name] if dimension.needs_extractor else None


def available(dimension: str, profile: str = "offline") -> str | None:
    """Why a dimension cannot be measured here under a profile, ``None`` if it can.

    Raises:
        ValueError: an unknown dimension or profile.
    """
    slot = _slot(_dimension(dimension), profile)
    return slot.missing() if slot else None


def extractor(dimension: str, profile: str = "offline") -> str | None:
    """Id of what a dimension is seen through under a profile, ``None`` if it is a formula on pixels.

    Raises:
        ValueError: an unknown dimension or profile.
    """
    slot = _slot(_dimension(dimension), profile)
    return slot.id if slot else None


@lru_cache(maxsize=16)
def _loaded(dimension: str, profile: str, device: str) -> Callable[..., Any]:
    return PROFILES[profile][dimension].load(device)


def _chosen(dimensions: Sequence[str] | None, frames: int, prompt: str | None, profile: str) -> list[Dimension]:
    """What to measure: all that can be by default; an explicit wish that cannot be met is an error."""
    if dimensions is None:
        return [
            d
            for d in DIMENSIONS.values()
            if frames >= d.min_frames and not (d.needs_prompt and prompt is None) and available(d.name, profile) is None
        ]
    chosen = [_dimension(name) for name in dimensions]
    for d in chosen:
        if frames < d.min_frames:
            raise ValueError(f"{d.name} needs at least {d.min_frames} frames, got {frames}")
        if d.needs_prompt and prompt is None:
            raise ValueError(f"{d.name} compares with the prompt, and none was given")
    return chosen


def evaluate(
    frames: Any,
    *,
    prompt: str | None = None,
    profile: str = "offline",
    dimensions: Sequence[str] | None = None,
    fps: float = 16.0,
    device: str = "cpu",
    extractors: Mapping[str, Callable[..., Any]] | None = None,
    name: str = "clip",
) -> dict[str, float]:
    """Raw scores of one clip.

    Args:
        frames: ``[T, H, W, 3]``, uint8, or floating point in [0, 1].
        prompt: what the clip shows, for overall consistency.
        profile: ``offline`` or ``official``.
        dimensions: what to measure; by default all that the profile has on this machine and the clip allows.
        fps: frames a second, for dynamic degree.
        device: where networks run.
        extractors: callables to use in place of the profile's, by dimension: frames to features ``[T, D]`` for both
            consistencies, two frames to the middle one, two frames to their flow, frames to a mean score on 0..10
            (aesthetic) or 0..100 (imaging), frames and prompt to a likeness.
        name: what to call the clip in errors, such as the name of its file.

    Returns:
        Scores by dimension.

    Raises:
        ValueError: no clip, an unknown name, a dimension that is not defined for it, or whose extractor is missing.
    """
    clip = as_uint8(frames, name)
    own = dict(extractors or {})
    _slot(_ALL[0], profile)
    found = {}
    for dimension in _chosen(dimensions, len(clip), prompt, profile):
        tool = own.get(dimension.name)
        if tool is None and dimension.needs_extractor:
            reason = available(dimension.name, profile)
            if reason is not None:
                raise ValueError(f"{dimension.name} cannot be measured under profile {profile!r}: {reason}")
            tool = _loaded(dimension.name, profile, str(device))
        found[dimension.name] = float(dimension.score(clip, tool, prompt or "", fps))
    return found
