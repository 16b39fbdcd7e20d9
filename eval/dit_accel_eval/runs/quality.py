"""Which metrics a run computes, and computing them; the metrics themselves are in other packages of dit_accel_eval."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dit_accel_eval.extractors import MissingExtractorError
from dit_accel_eval.runs.errors import EvalError
from dit_accel_eval.runs.folder import RunFolder
from dit_accel_eval.runs.settings import RunSettings
from dit_accel_eval.video import Frames

__all__ = [
    "DISTRIBUTION",
    "Chosen",
    "choose_metrics",
    "distribution",
    "extractor_ids",
    "finite",
    "paired",
    "vbench",
    "vbench_totals",
]

#: Metrics of all clips of a row against all dense clips.
DISTRIBUTION = ("fid", "kid", "is", "clip_score", "fvd")
_BASE = "psnr"
_VBENCH = "vbench"


@dataclass(frozen=True)
class Chosen:
    """Metrics by kind, and what had to be left out.

    Attributes:
        paired: names in :data:`dit_accel_eval.metrics.REGISTRY`; PSNR is always among them.
        distribution: see :data:`DISTRIBUTION`.
        vbench: dimensions of VBench.
        left_out: reason by metric that a preset has and this machine cannot compute.
    """

    paired: tuple[str, ...]
    distribution: tuple[str, ...]
    vbench: tuple[str, ...]
    left_out: Mapping[str, str]


def default_preset() -> str:
    """``standard`` where there is a GPU; ``quick``, without large networks, where there is none."""
    return "standard" if torch.cuda.is_available() else "quick"


def choose_metrics(asked: Sequence[str] | None, profile: str = "offline") -> Chosen:
    """Expand presets and check that everything can be computed here.

    Args:
        asked: presets (``standard``, ``quick``, ``svg``, ``teacache``), names of paired metrics, names in
            :data:`DISTRIBUTION`, ``vbench`` for all its dimensions or ``vbench:DIMENSION``. ``None`` is
            :func:`default_preset` without what is missing here.
        profile: ``"offline"`` or ``"official"``.

    Raises:
        EvalError: an unknown name, or something that was asked for and is missing here.
    """
    from dit_accel_eval.metrics import PRESETS, REGISTRY, available

    if profile not in ("offline", "official"):
        raise EvalError(f"profile must be offline or official, got {profile!r}")
    paired, distribution, dimensions = [_BASE], [], []
    left_out: dict[str, str] = {}
    for name in asked if asked is not None else [default_preset()]:
        if name in PRESETS:
            paired += PRESETS[name]
        elif name in DISTRIBUTION:
            distribution.append(name)
        elif name.split(":")[0] == _VBENCH:
            dimensions += _dimensions(name, profile, left_out)
        elif name in REGISTRY:
            paired.append(name)
        else:
            known = ", ".join([*PRESETS, *REGISTRY, *DISTRIBUTION, "vbench", "vbench:DIMENSION"])
            raise EvalError(f"metric must be one of {known}, got {name!r}")
    from dit_accel_eval.metrics import distribution as sets

    reasons = {name: available(name) for name in paired} | {n: sets.available(n, profile) for n in distribution}
    left_out |= {name: reason for name, reason in reasons.items() if reason is not None}
    if asked is not None and left_out:
        told = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise EvalError(f"metrics that were asked for cannot be computed here: {told} (see `dit-accel eval setup`)")
    usable = tuple(name for name in dict.fromkeys(paired) if name not in left_out)
    return Chosen(usable, tuple(dict.fromkeys(distribution)), tuple(dict.fromkeys(dimensions)), left_out)


def _dimensions(name: str, profile: str, left_out: dict[str, str]) -> list[str]:
    from dit_accel_eval import vbench

    wanted = list(vbench.DIMENSIONS) if name == _VBENCH else [name.partition(":")[2]]
    found = []
    for dimension in wanted:
        if dimension not in vbench.DIMENSIONS:
            raise EvalError(f"VBench's dimensions are {', '.join(vbench.DIMENSIONS)}, got {dimension!r}")
        reason = vbench.available(dimension, profile)
        if reason is None:
            found.append(dimension)
        else:
            left_out[f"vbench:{dimension}"] = reason
    return found


def finite(values: Mapping[str, float]) -> tuple[dict[str, float | None], list[str]]:
    """Numbers as JSON can hold them: ``None`` for those that are not finite, with a note for each."""
    notes = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    return {name: value if math.isfinite(value) else None for name, value in values.items()}, notes


def paired(
    clip: Frames, reference: Frames, names: Sequence[str], device: torch.device, labels: tuple[str, str]
) -> dict[str, float]:
    """Paired metrics of one clip; see :func:`dit_accel_eval.metrics.evaluate_pair`."""
    from dit_accel_eval.metrics import evaluate_pair

    return evaluate_pair(clip, reference, names, device=device, labels=labels)


def vbench(frames: Frames, prompt: str, settings: RunSettings, device: torch.device, name: str) -> dict[str, float]:
    """VBench's dimensions of one clip; see :func:`dit_accel_eval.vbench.evaluate`."""
    from dit_accel_eval import vbench as package

    return package.evaluate(
        frames,
        prompt=prompt,
        profile=settings.profile,
        dimensions=list(settings.vbench),
        device=str(device),
        name=name,
    )


def distribution(settings: RunSettings, folder: RunFolder, name: str, device: torch.device) -> dict[str, Any]:
    """Metrics of all clips of a row that were made, against the dense clips of the same samples.

    Returns:
        What :func:`dit_accel_eval.metrics.distribution.evaluate` says of each metric; ``error`` where it cannot be
        computed of these clips, such as too few of them.
    """
    from dit_accel_eval.metrics import distribution as package

    good = [s for s in settings.samples if folder.record(name, s).get("error") is None]

    def clips(row: str) -> Iterator[Frames]:
        for sample in good:
            yield folder.clip(row, sample)

    prompts = [settings.prompts[sample.index] for sample in good]
    found: dict[str, Any] = {}
    for metric in settings.distribution:
        options: dict[str, Any] = {"prompts": prompts, "profile": settings.profile, "device": str(device)}
        try:
            found |= package.evaluate(clips(name), clips("dense"), [metric], **options)
        except MissingExtractorError as error:
            raise EvalError(str(error)) from error
        except EvalError:
            raise
        except ValueError as error:
            found[metric] = {"value": None, "error": str(error)}
    return found


def extractor_ids(settings: RunSettings) -> dict[str, str | None]:
    """Id of every network that a paired metric or VBench looked through, with the sha256 of its pinned weights.

    Metrics over all clips name theirs themselves.
    """
    from dit_accel_eval.extractors import digests
    from dit_accel_eval.metrics import REGISTRY

    pinned = digests()
    ids = {REGISTRY[name].extractor for name in settings.metrics if name in REGISTRY}
    if settings.vbench:
        from dit_accel_eval.vbench import extractor

        ids |= {extractor(dimension, settings.profile) for dimension in settings.vbench}
    return {name: pinned.get(name) for name in sorted(name for name in ids if name is not None)}


def vbench_totals(means: Mapping[str, float], settings: RunSettings) -> dict[str, float]:
    """VBench's quality, semantic and total score of a row, which only the official extractors have."""
    if settings.profile != "official" or not means:
        return {}
    from dit_accel_eval.vbench import totals

    return totals(means)
