"""The profiles that ship fit the model that ships."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit_accel.profiles import Profile, check_models
from dit_accel.profiles.retarget import retarget
from dit_accel.targets import Target

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(path.parent for path in (ROOT / "examples/profiles").glob("*/profile.json"))


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_profile_fits_tiny_wan(folder: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    profile = Profile.load(folder)
    transformer = diffusers.WanTransformer3DModel.from_pretrained(ROOT / "examples/tiny_wan/transformer")
    assert check_models(profile, {"transformer": transformer}) == []
    part = profile.components["transformer"]
    assert (len(part.layers), part.heads) == (7, 5)
    assert profile.made_on["versions"]["torch"]
    assert profile.measured["prompts"]
    # Other targets follow from what it holds: a smaller error takes more.
    more = retarget(profile, Target("error", 0.02)).components["transformer"].density["*"]
    assert float(more.mean()) > float(part.density["*"].mean())


def test_there_is_one() -> None:
    assert SHIPPED
