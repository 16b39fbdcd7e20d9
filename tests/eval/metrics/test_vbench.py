"""VBench's formulas by hand, its profiles, suite and errors."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dit_accel_eval import vbench
from dit_accel_eval.vbench import formulas, pictures, suite

from .extracting import need


def noise(frames: int = 5, side: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, side, side, 3), dtype=np.uint8)


def test_consistency_by_hand() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    # frame 1: 0 to the one before, 0 to the first; frame 2: 0 and max(0, -1)
    assert formulas.consistency(features) == 0
    features = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    want = ((0.6 + 0.6) / 2 + (0.8 + 0.0) / 2) / 2
    assert formulas.consistency(features) == pytest.approx(want)


def test_temporal_flickering_by_hand() -> None:
    clip = np.zeros((3, 2, 2, 3), np.uint8)
    clip[1], clip[2] = 51, 255
    assert formulas.temporal_flickering(clip) == pytest.approx((255 - (51 + 204) / 2) / 255)
    assert vbench.evaluate(clip, dimensions=["temporal_flickering"]) == {"temporal_flickering": pytest.approx(0.5)}


def test_motion_smoothness_by_hand() -> None:
    """Every second frame is guessed; a last one without a successor is not looked at."""
    clip = np.stack([np.full((2, 2, 3), value, np.uint8) for value in (0, 20, 20, 50, 40, 7)])
    asked = []

    def average(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        asked.append((int(a[0, 0, 0]), int(b[0, 0, 0])))
        return ((a.astype(int) + b) // 2).astype(np.uint8)

    want = (255 - ((20 - 10) + (50 - 30)) / 2) / 255
    assert formulas.motion_smoothness(clip, average) == pytest.approx(want)
    assert asked == [(0, 20), (20, 40)]


def steady(lengths: list[float]):
    """Flow whose fastest 5 % have the next of these lengths and whose rest is still."""
    left = iter(lengths)

    def flow(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        found = np.zeros((*a.shape[:2], 2), np.float32)
        fast = found.reshape(-1, 2)
        fast[: int(len(fast) * 0.05)] = np.array([0.6, 0.8]) * next(left)
        return found

    return flow


def test_dynamic_degree_by_hand() -> None:
    clip = noise(16, 128)
    threshold = 6 * 128 / 256
    above, below = threshold * 1.01, threshold * 0.99
    needed = round(4 * 16 / 16)
    assert formulas.dynamic_degree(clip, steady([above] * needed + [below] * 99), fps=8) == 1
    assert formulas.dynamic_degree(clip, steady([above] * (needed - 1) + [below] * 99), fps=8) == 0
    # at 24 frames a second every third counts: 6 frames, round(1.5) = 2 moving pairs
    assert formulas.dynamic_degree(clip, steady([above, below, above]), fps=24) == 1
    assert formulas.dynamic_degree(clip, steady([above] + [below] * 4), fps=24) == 0


def test_static_filter_by_hand() -> None:
    clip = noise(8, 128)
    threshold, allowed = 3 * 128 / 256, round(2 * 8 / 16)

    def flow(neighbours: list[float], ends: float):
        left = iter([*neighbours, ends, ends])

        def estimate(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return np.full((*a.shape[:2], 2), next(left) / math.sqrt(2), np.float32)

        return estimate

    still, moved = threshold * 0.9, threshold * 1.1
    assert formulas.is_static(clip, flow([moved] * allowed + [still] * (7 - allowed), threshold * allowed * 1.9))
    assert not formulas.is_static(clip, flow([moved] * (allowed + 1) + [still] * 5, 0))
    assert not formulas.is_static(clip, flow([still] * 7, threshold * allowed * 2.1))


@pytest.mark.parametrize(
    ("count", "want"),
    [
        (16, [0, 2, 4, 6, 8, 10, 12, 14]),
        (8, list(range(8))),
        (3, [0, 1, 2, 2, 2, 2, 2, 2]),
        (21, [0, 3, 5, 8, 11, 13, 16, 19]),
    ],
)
def test_middle_frames(count: int, want: list[int]) -> None:
    assert formulas.middle_frames(count, 8) == want


def test_pictures_are_resized_as_torchvision_does() -> None:
    """Without antialiasing, rounded to uint8; the longer side is cut off, the crop is in the middle."""
    planes = pictures.to_planes(noise(2, 60)[:, :, :45])
    small = pictures._shorter(planes, 224, "bilinear")
    assert small.shape == (2, 3, int(224 * 60 / 45), 224)
    assert small.dtype == torch.uint8
    want = F.interpolate(planes.float(), size=tuple(small.shape[2:]), mode="bilinear").round()
    assert torch.equal(small.float(), want)
    cut = pictures.clip_input(planes)
    bicubic = F.interpolate(planes.float(), size=(298, 224), mode="bicubic").round().clamp(0, 255)[:, :, 37:261]
    mean, deviation = (torch.tensor(x).view(1, 3, 1, 1) for x in pictures.CLIP)
    torch.testing.assert_close(cut, (bicubic / 255 - mean) / deviation)
    assert pictures.dino_input(planes).shape == (2, 3, 298, 224)
    assert pictures.musiq_input(pictures.to_planes(np.zeros((1, 300, 1000, 3), np.uint8))).shape == (1, 3, 153, 512)
    assert pictures.musiq_input(planes).shape == (2, 3, 60, 45)


def test_callables_of_a_users_own() -> None:
    clip = noise(4)
    found = vbench.evaluate(
        clip,
        prompt="a cat",
        dimensions=["subject_consistency", "aesthetic_quality", "imaging_quality", "overall_consistency"],
        extractors={
            "subject_consistency": lambda frames: torch.ones(len(frames), 3),
            "aesthetic_quality": lambda frames: 6.5,
            "imaging_quality": lambda frames: 71.0,
            "overall_consistency": lambda frames, prompt: len(prompt) / 100,
        },
    )
    assert found == pytest.approx(
        {"subject_consistency": 1, "aesthetic_quality": 0.65, "imaging_quality": 0.71, "overall_consistency": 0.05}
    )


def test_totals_by_hand() -> None:
    top = {name: high for name, (_, high) in suite.RANGES.items()}
    assert vbench.totals(top) == pytest.approx({"quality": 1, "semantic": 1, "total": 1})
    scores = top | {"dynamic_degree": 0.0, "scene": 0.4111}
    found = vbench.totals(scores)
    assert found["quality"] == pytest.approx(6 / 6.5)
    assert found["semantic"] == pytest.approx(8.5 / 9)
    assert found["total"] == pytest.approx((4 * 6 / 6.5 + 8.5 / 9) / 5)
    quality = {name: top[name] for name in suite.QUALITY}
    assert vbench.totals(quality) == pytest.approx({"quality": 1})
    assert len(suite.SEMANTIC) == 9


def test_totals_refuse_what_they_do_not_fit() -> None:
    top = {name: high for name, (_, high) in suite.RANGES.items()}
    with pytest.raises(
        ValueError, match="fitted to its own extractors, so totals need profile 'official', got 'offline'"
    ):
        vbench.totals(top, profile="offline")
    with pytest.raises(ValueError, match="quality lacks motion_smoothness"):
        vbench.totals({name: 1.0 for name in suite.QUALITY if name != "motion_smoothness"})
    with pytest.raises(ValueError, match="unknown dimensions colour"):
        vbench.totals(top | {"colour": 1})
    with pytest.raises(ValueError, match="these are not: color"):
        vbench.totals(top | {"color": math.nan})


def test_prompts(tmp_path, monkeypatch) -> None:
    entries = [
        {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
        {"prompt_en": "a cat", "dimension": ["overall_consistency", "aesthetic_quality"]},
        {"prompt_en": "a red car", "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}},
    ]
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps(entries))
    found = vbench.load_prompts(path)
    assert [(p.prompt, p.samples) for p in found] == [
        ("In a still frame, a stop sign", 25),
        ("a cat", 5),
        ("a red car", 5),
    ]
    assert found[2].auxiliary == {"color": {"color": "red"}}
    assert [p.prompt for p in vbench.load_prompts(path, dimensions=("color",))] == ["a red car"]
    package = tmp_path / "site" / "vbench"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / path.name).write_text(json.dumps(entries[:1]))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert len(vbench.load_prompts()) == 1
    path.write_text('{"prompts": 1}')
    with pytest.raises(ValueError, match=r"VBench_full_info\.json is no list of VBench's prompts"):
        vbench.load_prompts(path)


def test_errors() -> None:
    clip = noise(2)
    with pytest.raises(ValueError, match="dimension must be one of .*did you mean 'dynamic_degree'"):
        vbench.evaluate(clip, dimensions=["dynamic_degre"])
    with pytest.raises(ValueError, match="profile must be one of offline, official, got 'best'"):
        vbench.evaluate(clip, profile="best", dimensions=["temporal_flickering"])
    with pytest.raises(ValueError, match="motion_smoothness needs at least 3 frames, got 2"):
        vbench.evaluate(clip, dimensions=["motion_smoothness"])
    with pytest.raises(ValueError, match="overall_consistency compares with the prompt, and none was given"):
        vbench.evaluate(clip, dimensions=["overall_consistency"])
    with pytest.raises(ValueError, match=r"aesthetic_quality cannot be measured under profile 'offline': .*'official'"):
        vbench.evaluate(clip, dimensions=["aesthetic_quality"])
    with pytest.raises(ValueError, match=r"a\.mp4 must be frames"):
        vbench.evaluate(clip[0], name="a.mp4")
    with pytest.raises(ValueError, match="fps must be above 0, got 0"):
        vbench.evaluate(noise(4), dimensions=["dynamic_degree"], fps=0, extractors={"dynamic_degree": steady([])})
    broken = clip / 255.0
    broken[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="clip has 1 values that are NaN"):
        vbench.evaluate(broken)


def test_every_dimension_names_its_extractor() -> None:
    for name, dimension in vbench.DIMENSIONS.items():
        for profile in vbench.PROFILES:
            assert (vbench.extractor(name, profile) is not None) == dimension.needs_extractor
    assert vbench.extractor("motion_smoothness") == "rife-3.9"
    assert vbench.extractor("motion_smoothness", "official") == "amt-s"


def test_offline_profile_on_a_pan() -> None:
    need("efficientnet-lite0", "rife-3.9", "brisque-svm", "brisque-range")
    from skimage import data

    picture = data.astronaut()
    clip = np.stack([picture[40:168, 60 + 6 * i : 188 + 6 * i] for i in range(5)])
    found = vbench.evaluate(clip, fps=8)
    assert list(found) == [
        "subject_consistency",
        "background_consistency",
        "temporal_flickering",
        "motion_smoothness",
        "dynamic_degree",
        "imaging_quality",
    ]
    assert found["dynamic_degree"] == 1
    assert found["motion_smoothness"] > 0.98
    still = vbench.evaluate(np.repeat(clip[:1], 5, axis=0), fps=8)
    assert still["dynamic_degree"] == 0
    assert still["subject_consistency"] == pytest.approx(1)
    assert list(vbench.evaluate(clip[:1])) == ["imaging_quality"]
