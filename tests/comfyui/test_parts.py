"""Settings, schedule, masks, profiles and pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_fakes import FlowSampling

from dit_accel.ledger import LayerStatus, RunStatus
from dit_accel.presets import load_methods
from dit_accel_patches.comfyui.comparison import difference, psnr
from dit_accel_patches.comfyui.masks import key_valid
from dit_accel_patches.comfyui.picture import density_picture
from dit_accel_patches.comfyui.profile import Profile
from dit_accel_patches.comfyui.schedule import Schedule, Window
from dit_accel_patches.comfyui.settings import Settings, parse_blocks


@pytest.mark.parametrize(
    ("text", "blocks"),
    [("", ()), (" 3 ", (3,)), ("0, 1, 47-49", (0, 1, 47, 48, 49)), ("2-2,1,,1 ", (1, 2)), ("7 - 9", (7, 8, 9))],
)
def test_block_lists(text: str, blocks: tuple[int, ...]) -> None:
    assert parse_blocks(text) == blocks


@pytest.mark.parametrize(
    ("text", "part"), [("a", "'a'"), ("1-", "'1-'"), ("1;2", "'1;2'"), ("9-7", "write '7-9'"), ("-1", "'-1'")]
)
def test_malformed_block_lists(text: str, part: str) -> None:
    with pytest.raises(ValueError, match="dense_blocks") as error:
        parse_blocks(text)
    assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"start_percent": 0.5, "end_percent": 0.5}, "start_percent must be below end_percent, got 0.5 and 0.5"),
        ({"end_percent": 1.5}, "end_percent must be between 0 and 1, got 1.5"),
        ({"quality": "best"}, "quality must be one of balanced, fast, high, method, custom, got 'best'"),
        (
            {"precision": "int9"},
            "precision must be one of model, bfloat16, float16, auto, int8_fp8, int8, got 'int9'",
        ),
        ({"method": "na", "precision": "int8"}, "precision='int8' cannot go with score='window'"),
        ({"min_tokens": -1}, "min_tokens must be at least 0, got -1"),
        ({"method": "atuo"}, "did you mean 'auto'"),
        ({"quality": "custom", "density": 2.0}, "density"),
    ],
)
def test_settings_say_what_is_wrong(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError) as error:
        Settings(**changes)
    assert part in str(error.value)


def test_every_method_takes_its_own_quality() -> None:
    for name in load_methods():
        settings = Settings(method=name, quality="method")
        assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_quality_becomes_density() -> None:
    assert [Settings(method="union", quality=q).build().density for q in ("fast", "balanced", "high")] == [
        0.1,
        0.2,
        0.35,
    ]
    assert Settings(method="union", quality="custom", density=0.07).build().density == 0.07
    assert Settings(quality="method").build() == load_methods()["auto"]


@pytest.mark.parametrize(
    ("wanted", "first", "last"), [(0.1, 0.16, 0.04), (0.2, 0.32, 0.08), (0.8, 1.0, 0.6), (1.0, 1.0, 1.0)]
)
def test_a_falling_density_falls_around_the_wanted_one(wanted: float, first: float, last: float) -> None:
    made = Settings(quality="custom", density=wanted).build()
    assert made.density == pytest.approx((first, last))
    assert made.for_pictures.density == wanted
    assert dict(made.pictures).keys() == dict(load_methods()["auto"].pictures).keys()


def test_number_formats_become_those_of_the_method() -> None:
    assert [Settings(precision=p).build().precision for p in ("model", "bfloat16", "auto", "int8")] == [
        *("bf16", "bf16", "auto", "int8"),
    ]
    assert Settings(method="dense", precision="int8").build().is_dense


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"keys method, .* got \['colour'\]"):
        Settings.from_dict({"colour": 1})


@pytest.mark.parametrize(
    ("start", "end", "dense", "until"), [(0.0, 1.0, 0, 10), (0.2, 1.0, 2, 10), (0.15, 0.8, 2, 9), (0.5, 0.55, 5, 6)]
)
def test_window_counts_steps(start: float, end: float, dense: int, until: int) -> None:
    schedule = Schedule.read(torch.linspace(1, 0, 11))
    assert schedule is not None
    assert schedule.shares(Window.of(FlowSampling(), start, end)) == (dense / 10, until / 10)


def test_steps_between_two_sigmas_belong_to_the_earlier() -> None:
    schedule = Schedule((1.0, 0.75, 0.5, 0.25, 0.0))
    assert [schedule.step(s) for s in (1.0, 0.9, 0.75, 0.6, 0.50002, 0.49, 0.1, 2.0)] == [0, 0, 1, 1, 2, 2, 3, 0]
    assert Schedule.read(torch.ones(1)) is None


def test_masks() -> None:
    lowest = torch.finfo(torch.float32).min
    seen = torch.tensor([True, True, False, True])
    hidden = torch.zeros(4).masked_fill(~seen, lowest)
    for mask in (seen[None], hidden[None], hidden[None, None], hidden[None, None, None], hidden.expand(2, 3, 4, 4)):
        found = key_valid(mask, 2, 4)
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found, seen.expand(2, 4))
    assert key_valid(torch.zeros(1, 1, 1, 4), 2, 4) is None
    assert key_valid(torch.ones(1, 4, dtype=torch.bool), 1, 4) is None
    reasons = {
        "weighs keys": torch.tensor([[0.0, -1.0, 0.0, 0.0]]),
        "query to query": torch.zeros(4, 4),
        "head to head": torch.zeros(1, 2, 1, 4),
        "has shape": torch.zeros(1, 5),
        "batch of 3": torch.zeros(3, 1, 4),
    }
    for part, mask in reasons.items():
        assert part in str(key_valid(mask, 2, 4))


def test_profile_round_trip(tmp_path: Path) -> None:
    profile = Profile("WanModel", Settings(quality="fast", dense_blocks=(0, 3)))
    path = profile.save(tmp_path / "new", "my wan-1.3b")
    assert Profile.load(path) == profile
    assert [p.name for p in path.parent.iterdir()] == ["my wan-1.3b.json"]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"version": 9}, "update dit_accel"),
        ({"format": "x"}, "is not a profile"),
        ({"extra": 1}, "must have the keys"),
        ({"plan": "../x.safetensors"}, "the name of a file beside it"),
        ({"settings": {"method": "nope"}}, "unknown method 'nope'"),
    ],
)
def test_profiles_that_are_refused(tmp_path: Path, change: dict[str, Any], part: str) -> None:
    path = Profile("WanModel", Settings()).save(tmp_path, "a")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError) as error:
        Profile.load(path)
    assert part in str(error.value)


def test_profile_names_and_models(tmp_path: Path) -> None:
    profile = Profile("WanModel", Settings())
    for name in ("", "../x", "a/b", "a."):
        with pytest.raises(ValueError, match="name takes letters"):
            profile.save(tmp_path, name)
    with pytest.raises(FileNotFoundError):
        Profile.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match="made for WanModel, this model is Flux"):
        profile.check("Flux")
    replace(profile, model="WanTransformer3DModel").check("WanModel", ("WanTransformer3DModel",))


def test_picture_shows_shares() -> None:
    layers = [LayerStatus("a", 4, {}, 0.5, [0.0, 1.0]), LayerStatus("b", 0, {"dense layer": 4}), LayerStatus("c")]
    status = RunStatus("M", "auto", layers=layers, density_by_step={0: 1.0, 1: 0.5})
    (picture,) = density_picture([status])
    colours = {tuple(round(float(v), 2) for v in c) for c in picture.reshape(-1, 3)}
    assert (0.16, 0.11, 0.35) in colours  # a head with nothing computed
    assert (0.99, 0.91, 0.15) in colours  # a head with everything, and the dense layer
    rows = 2 * 12  # the third layer never ran
    assert picture.shape[0] == 12 + rows + 12 + 96 + 12
    bar = picture[12 + rows + 12 :, :, :]
    high, low = ((bar[:96, 12 + x] - bar[0, 0]).abs().sum(-1) > 0.5 for x in (10, 500))
    assert int(high.sum()) == 96
    assert int(low.sum()) == 48
    assert density_picture([]).shape == (1, 96, 512, 3)


def test_distance() -> None:
    a, b = torch.zeros(1, 2, 2, 3), torch.full((1, 2, 2, 3), 0.1)
    assert psnr(a, b) == pytest.approx(20.0)
    assert psnr(a, a) == float("inf")
    assert torch.equal(difference(a, b, 100.0), torch.ones(1, 2, 2, 3))
