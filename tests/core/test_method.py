"""Methods: validation, JSON round trip, presets."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.method import METHOD_VERSION, Method
from dit_accel.presets import get_method, load_methods


def test_presets_load_and_name_their_papers() -> None:
    known = load_methods()
    assert {"dense", "paro", "adaspa", "gna", "na", "dina", "auto"} <= set(known)
    papers = {name: method.paper for name, method in known.items()}
    assert papers["paro"] == "2506.16054"
    assert papers["adaspa"] == "2502.21079"
    assert papers["gna"] == "2504.16922"
    assert all(method.summary for method in known.values())


@pytest.mark.parametrize("name", sorted(load_methods()))
def test_presets_round_trip_and_print_their_slots(name: str) -> None:
    method = get_method(name)
    assert Method.from_json(method.to_json()) == method
    text = str(method)
    assert method.score in text
    assert method.select in text
    assert method.compensate in text


@given(
    density=st.floats(0.01, 1.0),
    warmup=st.floats(0, 1),
    refresh=st.lists(st.floats(0, 1), max_size=4),
    select=st.sampled_from(["top_k", "top_k_adaptive", "top_k_head", "top_p", "threshold"]),
)
def test_any_valid_method_round_trips(density: float, warmup: float, refresh: list[float], select: str) -> None:
    method = Method(name="x", density=density, warmup=warmup, refresh=tuple(refresh), select=select)
    assert Method.from_json(method.to_json()) == method
    assert hash(method) == hash(Method.from_json(method.to_json()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"density": 0}, r"density must be above 0 and at most 1.*got 0"),
        ({"density": 2}, r"density must be .*got 2"),
        ({"density": float("nan")}, "density must be"),
        ({"density": (0.5, 0.2, 0.1)}, "density must be"),
        ({"density": True}, "density must be"),
        ({"warmup": -0.1}, "warmup must be between 0 and 1, got -0.1"),
        ({"refresh": (0.5, 1.5)}, "refresh must be shares"),
        ({"block_k": 96}, "block_k must be one of 16, 32, 64, 128, got 96"),
        ({"select": "best"}, "select must be one of"),
        ({"order": ()}, "order must be at least one"),
        ({"score": "window", "compensate": "mean"}, "compensate='mean' cannot go with score='window'"),
        ({"score": "window", "order_choice": "recall"}, "needs scores to choose by"),
        ({"score": "none"}, "select 'all' or 'insisted' only"),
        ({"score": "mean_pool", "static": True}, "static plan is made from score 'mass'"),
        ({"order": ("fhw", "hwf")}, "several orders need order_choice='recall'"),
        ({"order_choice": "paro"}, "order_choice='paro' is for static methods"),
        ({"order": "hilbert"}, "hilbert"),
        ({"score": "window", "density": (0.5, 0.2)}, "takes one density"),
        ({"score": "window", "window": "wide"}, "wide"),
        ({"dense_layers": (0.5,)}, "dense_layers must be layer numbers"),
        ({"block_q": 64.0}, "block_q must be one of 16, 32, 64, 128, got 64.0"),
        ({"densty": 0.2}, r"unknown option 'densty'; known are .*density"),
    ],
)
def test_bad_values_say_the_value_and_what_was_expected(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Method(name="x").replace(**changes)


def test_unknown_method_names_the_closest() -> None:
    with pytest.raises(ValueError, match=r"unknown method 'adspa'.*did you mean 'adaspa'"):
        get_method("adspa")
    with pytest.raises(TypeError, match="must be a name or a Method, got int"):
        get_method(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a method file"),
        ("[1]", "JSON object with a 'name'"),
        (json.dumps({"name": "x", "version": METHOD_VERSION + 1}), "newer dit_accel is needed"),
        (json.dumps({"name": "x", "colour": "red"}), "unknown keys.*colour"),
        (json.dumps({"name": "x", "density": "much"}), "density must be"),
    ],
)
def test_corrupt_method_files_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Method.from_json(text)


def test_density_falls_from_the_first_plan_to_the_last() -> None:
    method = Method(name="x", density=(0.8, 0.2))
    assert [method.density_at(place) for place in (0.0, 0.5, 1.0, 2.0)] == pytest.approx([0.8, 0.5, 0.2, 0.2])
    assert Method(name="x", density=0.3).density_at(0.9) == 0.3


def test_axes_stands_for_the_six_permutations() -> None:
    method = Method(name="x", order="axes", order_choice="recall")  # type: ignore[arg-type]
    assert method.order == ("fhw", "fwh", "hwf", "hfw", "whf", "wfh")
    both = Method(name="x", order=("raster", "axes", "fhw"), order_choice="recall")
    assert both.order == ("raster", *method.order)
    assert Method.from_json(method.to_json()) == method


def test_a_change_that_does_not_go_with_the_form_for_pictures_leaves_it_out() -> None:
    auto = get_method("auto")
    assert dict(auto.pictures)["compensate"].startswith("residual")
    assert dict(auto.replace(density=0.4).pictures)["compensate"] == dict(auto.pictures)["compensate"]
    led = auto.replace(reuse=("every:2", "leaders:0x2"))  # a residual belongs to one layer
    assert led.pictures == ()
    assert led.compensate == auto.compensate
    with pytest.raises(ValueError, match="cannot go with reuse"):
        auto.replace(reuse=("every:2", "leaders:0x2"), pictures=auto.pictures)
    with pytest.raises(ValueError, match="warmup"):
        auto.replace(warmup=2.0)
