"""Profiles on disk: round trips, and files that are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import make_component, make_profile
from safetensors.torch import save

import dit_accel.profiles.files
from dit_accel.geometry import TokenGeometry
from dit_accel.profiles import ANY_BRANCH, ComponentProfile, ErrorCurve, Profile
from dit_accel.static_plan import StaticPlan

FILE = "profile.json"


def _same(found: Profile, wanted: Profile) -> None:
    """Equality but for densities, which are written with four digits."""
    for name in ("method", "control", "target", "error", "task", "steps", "curve", "measured", "made_on", "name"):
        assert getattr(found, name) == getattr(wanted, name), name
    assert tuple(found.notes) == tuple(wanted.notes)
    assert set(found.components) == set(wanted.components)
    for name, part in wanted.components.items():
        own = found.components[name]
        for field in ("model", "fingerprint", "geometry", "layers", "heads", "starts", "orders", "dense_layers"):
            assert getattr(own, field) == getattr(part, field), field
        assert set(own.density) == set(part.density)
        for branch, density in part.density.items():
            torch.testing.assert_close(own.density[branch], density, atol=1.01e-4, rtol=0)
        if part.curve is not None:
            assert own.curve is not None
            assert own.curve.densities == part.curve.densities
            assert own.curve.by_head == part.curve.by_head
            assert torch.equal(own.curve.error, part.curve.error)
            assert torch.equal(own.curve.output, part.curve.output)


def test_a_folder_and_a_file_hold_the_same(profile: Profile, tmp_path: Path) -> None:
    assert profile.save(tmp_path / "folder") == tmp_path / "folder" / FILE
    assert profile.save(tmp_path / "one.json") == tmp_path / "one.json"
    for path in (tmp_path / "folder", tmp_path / "folder" / FILE, tmp_path / "one.json", str(tmp_path / "folder")):
        _same(Profile.load(path), profile)
    assert sorted(p.suffix for p in (tmp_path / "folder").iterdir()) == [".json", ".safetensors"]


shares = st.floats(1e-3, 1.0)
words = st.text(max_size=12)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def profiles(draw: Any) -> Profile:
    parts, layers, heads = (draw(st.integers(1, 3)) for _ in range(3))
    size = parts * layers * heads
    values = torch.tensor(draw(st.lists(shares, min_size=size, max_size=size))).view(parts, layers, heads)
    branches = draw(st.sets(st.sampled_from([ANY_BRANCH, "cond", "uncond"]), min_size=1))
    changes = {
        "density": dict.fromkeys(sorted(branches), values),
        "geometry": TokenGeometry(
            draw(st.tuples(*[st.integers(1, 9)] * 3)), draw(st.integers(0, 5)), draw(st.integers(0, 5))
        ),
        "orders": draw(st.sampled_from([(), tuple(("hwf",) * heads for _ in range(layers))])),
        "dense_layers": tuple(sorted(draw(st.sets(st.integers(0, layers - 1))))),
    }
    if draw(st.booleans()):
        changes["curve"] = None
    return make_profile(
        make_component(parts, layers, heads, **changes),
        steps=draw(st.integers(0, 100)),
        error=draw(st.none() | st.floats(1e-4, 0.9)),
        measured=draw(st.dictionaries(words, plain, max_size=3)),
        name=draw(words),
        notes=tuple(draw(st.lists(words, max_size=2))),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(profiles())
def test_round_trip(tmp_path: Path, made: Profile) -> None:
    made.save(tmp_path)
    found = Profile.load(tmp_path)
    _same(found, made)
    again = found.save(tmp_path / "again.json").read_text()
    assert json.loads(again)["components"] == json.loads((tmp_path / FILE).read_text())["components"]
    assert len(list(tmp_path.glob("profile*.safetensors"))) <= 1  # those of the profiles before are gone


def test_a_static_plan_travels_along(tmp_path: Path) -> None:
    from dit_accel.presets import get_method

    method = get_method("paro").replace(order=("fhw", "hwf"))
    plan = StaticPlan(
        method,
        "WanTransformer3DModel",
        TokenGeometry((5, 8, 8)),
        6,
        torch.tensor([[0, 1], [1, 0]], dtype=torch.int32),
        torch.randint(0, 2**20, (4, 2, 2, 5, 1), dtype=torch.int32),
    )
    part = make_component(
        1, 2, 2, plan=plan, density={}, curve=None, geometry=plan.geometry, dense_layers=(), orders=()
    )
    made = make_profile(part, method=method, control="plan", curve=None, error=None)
    made.save(tmp_path)
    found = Profile.load(tmp_path).components["transformer"].plan
    assert found is not None
    assert torch.equal(found.bits, plan.bits)
    assert torch.equal(found.head_choice, plan.head_choice)
    assert (found.method, found.steps, found.geometry) == (plan.method, plan.steps, plan.geometry)


def test_a_person_can_read_it(profile: Profile, tmp_path: Path) -> None:
    text = profile.save(tmp_path).read_text(encoding="utf-8")
    record = json.loads(text)
    row = record["components"]["transformer"]["layers"][1]
    assert row["name"] == "blocks.1.attn1"
    assert len(row["density"]["*"]) == 2
    assert max(map(len, text.splitlines())) < 200
    assert "ein Vögelchen" in text


def _with(path: Path, **changes: Any) -> None:
    record = json.loads((path / FILE).read_text())
    record.update(changes)
    (path / FILE).write_text(json.dumps(record))


def _component(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((path / FILE).read_text())
    change(record["components"]["transformer"])
    (path / FILE).write_text(json.dumps(record))


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_a_json_cut_short(profile: Profile, tmp_path: Path, keep: float) -> None:
    data = profile.save(tmp_path).read_bytes()
    (tmp_path / FILE).write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match=r"profile\.json is not a profile: not JSON, or cut short"):
        Profile.load(tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_tensors_cut_short(profile: Profile, tmp_path: Path, keep: float) -> None:
    profile.save(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    with pytest.raises(ValueError, match=r"safetensors is not what profile\.json was written with"):
        Profile.load(tmp_path)


def test_tensors_that_are_absent(profile: Profile, tmp_path: Path) -> None:
    profile.save(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"names {file.name}, which is not beside it"):
        Profile.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no profile at"):
        Profile.load(tmp_path / "nothing")


def test_tensors_outside_of_the_folder_are_not_read(profile: Profile, tmp_path: Path) -> None:
    profile.save(tmp_path)
    _with(tmp_path, tensors="../secret.safetensors")
    with pytest.raises(ValueError, match="tensors must be the name of a file beside it"):
        Profile.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"format": "dit_accel.comfyui_profile"},
            "its format must be 'dit_accel.profile', got 'dit_accel.comfyui_profile'",
        ),
        ({"version": 2}, "has version 2, this dit_accel reads up to 1; a newer dit_accel is needed"),
        ({"version": "1"}, "has version '1'"),
        ({"version": True}, "has version True"),
        ({"extra": 1}, r"unknown \['extra'\]"),
        ({"steps": -1}, "steps must be a number of steps, got -1"),
        ({"control": "magic"}, "control must be one of"),
        ({"error": 3}, "error must be above 0 and below 1, got 3"),
        ({"components": {}}, "components must be at least one transformer"),
        ({"components": 3}, "parts missing or of another type"),
        ({"method": {"name": "x", "colour": 1}}, r"unknown keys \['colour'\]"),
        ({"method": {"name": "x", "version": 99}}, "a newer dit_accel is needed"),
        ({"quality": {"points": []}}, "a quality curve has 'source' and 'points'"),
    ],
)
def test_foreign_and_newer_files(profile: Profile, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    profile.save(tmp_path)
    _with(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as told:
        Profile.load(tmp_path)
    assert str(tmp_path / FILE) in str(told.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["layers"][0]["density"].update({"*": [[2.0, 0.1]] * 2}), "above 0 and at most 1 everywhere"),
        (lambda c: c["layers"][0]["density"].update({"*": [[0.1, 0.1]]}), "profile"),
        (lambda c: c["layers"].clear(), "layers and heads must be positive"),
        (lambda c: c["layers"][1].pop("name"), "parts missing"),
        (lambda c: c["layers"][1].update(precision="int8"), "nothing else can be computed by this version"),
        (lambda c: c.update(heads=3), "must be of shape"),
        (lambda c: c.update(starts=[0.5, 0.2]), "rising shares of the run"),
        (lambda c: c["layers"][1]["orders"].pop(), "lists of 2 orders"),
        (lambda c: c.pop("fingerprint"), "parts missing"),
        (lambda c: c.update(curve_densities=[0.1]), "an error curve has"),
        (lambda c: c["geometry"].update(grid=[0, 1, 1]), "height|frames of grid must be at least 1"),
    ],
)
def test_bad_components(
    profile: Profile, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    profile.save(tmp_path)
    _component(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        Profile.load(tmp_path)


def test_json_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("[1]")
    with pytest.raises(ValueError, match="got 'list'"):
        Profile.load(tmp_path)


def test_writing_is_all_or_nothing(profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the writer is stopped, what was there is still there, with its tensors."""
    profile.save(tmp_path)
    other = make_profile(make_component(1, 1, 1), name="other")
    real = dit_accel.profiles.files.write_whole

    def stopped(path: Path, data: bytes) -> None:
        if Path(path).suffix == ".json":
            raise OSError("no space left on device")
        real(path, data)

    monkeypatch.setattr(dit_accel.profiles.files, "write_whole", stopped)
    with pytest.raises(OSError, match="no space left"):
        other.save(tmp_path)
    _same(Profile.load(tmp_path), profile)
    monkeypatch.undo()
    other.save(tmp_path)
    _same(Profile.load(tmp_path), other)


def test_another_file_of_that_name_is_not_taken_for_a_profile(profile: Profile, tmp_path: Path) -> None:
    """Tensors that an unrelated JSON names are left alone."""
    (tmp_path / FILE).write_text(json.dumps({"tensors": "theirs.safetensors"}))
    (tmp_path / "theirs.safetensors").write_bytes(save({"x": torch.zeros(1)}))
    profile.save(tmp_path)
    assert (tmp_path / "theirs.safetensors").is_file()


def test_a_curve_must_fit_its_component() -> None:
    with pytest.raises(ValueError, match=r"an error curve has output \[P, L, H\]"):
        ErrorCurve((0.1, 0.2), torch.zeros(3, 1, 1, 1), torch.zeros(1, 1, 1))
    wrong = ErrorCurve((0.1,), torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1))
    with pytest.raises(ValueError, match="curve must be of parts, layers and heads"):
        make_component(curve=wrong)
    assert isinstance(make_component(), ComponentProfile)
