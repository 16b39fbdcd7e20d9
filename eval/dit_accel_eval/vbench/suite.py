"""The standard suite: its prompts, and how its scores are normalised and added up (arXiv 2311.17982)."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["QUALITY", "RANGES", "SEMANTIC", "SuitePrompt", "load_prompts", "totals"]

#: Lowest and highest score of each dimension, which normalisation maps to 0 and 1.
RANGES: dict[str, tuple[float, float]] = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "dynamic_degree": (0.0, 1.0),
    "aesthetic_quality": (0.0, 1.0),
    "imaging_quality": (0.0, 1.0),
    "object_class": (0.0, 1.0),
    "multiple_objects": (0.0, 1.0),
    "human_action": (0.0, 1.0),
    "color": (0.0, 1.0),
    "spatial_relationship": (0.0, 1.0),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}
#: Dimensions of the quality score, with their weights.
QUALITY: dict[str, float] = {
    "subject_consistency": 1.0,
    "background_consistency": 1.0,
    "temporal_flickering": 1.0,
    "motion_smoothness": 1.0,
    "dynamic_degree": 0.5,
    "aesthetic_quality": 1.0,
    "imaging_quality": 1.0,
}
#: Dimensions of the semantic score, of equal weight.
SEMANTIC: tuple[str, ...] = tuple(name for name in RANGES if name not in QUALITY)


def totals(scores: Mapping[str, float], *, profile: str = "official") -> dict[str, float]:
    """Quality, semantic and total score of a whole suite.

    Args:
        scores: mean raw score of each dimension.
        profile: what made the scores; only ``official`` ones fit the published ranges.

    Returns:
        ``quality`` where its seven dimensions are given, ``semantic`` where its nine are, and ``total``
        ``(4 quality + semantic) / 5`` where both are.

    Raises:
        ValueError: another profile, an unknown dimension, a score that is not finite, or neither group complete.
    """
    if profile != "official":
        raise ValueError(
            f"VBench's ranges were fitted to its own extractors, so totals need profile 'official', got {profile!r}"
        )
    unknown = sorted(set(scores) - set(RANGES))
    if unknown:
        raise ValueError(f"unknown dimensions {', '.join(unknown)}; known are {', '.join(RANGES)}")
    bad = sorted(name for name, score in scores.items() if not math.isfinite(score))
    if bad:
        raise ValueError(f"scores must be finite, these are not: {', '.join(bad)}")
    normal = {name: (score - RANGES[name][0]) / (RANGES[name][1] - RANGES[name][0]) for name, score in scores.items()}
    found: dict[str, float] = {}
    if set(QUALITY) <= set(normal):
        found["quality"] = sum(weight * normal[name] for name, weight in QUALITY.items()) / sum(QUALITY.values())
    if set(SEMANTIC) <= set(normal):
        found["semantic"] = sum(normal[name] for name in SEMANTIC) / len(SEMANTIC)
    if not found:
        missing = ", ".join(name for name in QUALITY if name not in normal)
        raise ValueError(
            f"totals need all seven dimensions of quality or all nine of semantics; quality lacks {missing}"
        )
    if len(found) == 2:
        found["total"] = (4 * found["quality"] + found["semantic"]) / 5
    return found


@dataclass(frozen=True)
class SuitePrompt:
    """One prompt of the suite.

    Attributes:
        prompt: the text.
        dimensions: what is measured on its clips.
        auxiliary: what some semantic dimensions look for, by dimension.
    """

    prompt: str
    dimensions: tuple[str, ...]
    auxiliary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Clips that the suite asks for: 25 where flickering is measured, 5 elsewhere."""
        return 25 if "temporal_flickering" in self.dimensions else 5


def _find() -> Path:
    spec = importlib.util.find_spec("vbench")
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / "VBench_full_info.json"
        if path.is_file():
            return path
    raise ValueError(
        "VBench's prompts are not here: give the path of VBench_full_info.json, "
        "which lies in VBench's repository and in the package vbench"
    )


def load_prompts(path: str | Path | None = None, *, dimensions: tuple[str, ...] = ()) -> list[SuitePrompt]:
    """Read the official list.

    Args:
        path: ``VBench_full_info.json``; that of an installed ``vbench`` by default, which is not imported.
        dimensions: keep prompts of these only; all by default.

    Raises:
        ValueError: no list was found, or the file is none.
    """
    path = Path(path) if path is not None else _find()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        prompts = [
            SuitePrompt(entry["prompt_en"], tuple(entry["dimension"]), entry.get("auxiliary_info", {}))
            for entry in entries
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no list of VBench's prompts: {type(error).__name__}: {error}") from error
    return [prompt for prompt in prompts if not dimensions or set(dimensions) & set(prompt.dimensions)]
