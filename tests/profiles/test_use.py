"""Profiles in use: densities arrive at the heads; other grids, other models; targets from what a profile holds."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from made import make_component, make_pipe, make_profile

import dit_accel
from dit_accel.geometry import TokenGeometry
from dit_accel.method import Method
from dit_accel.profiles import ANY_BRANCH, ComponentProfile, ErrorCurve, Profile, fingerprint, fit
from dit_accel.profiles.retarget import densities_for, expected_error, retarget
from dit_accel.targets import Target

GRID = TokenGeometry((5, 8, 8))
METHOD = Method(
    name="trial", density=0.2,
    order=("fhw", "hwf"), order_choice="recall", score="mass", select="top_k", compensate="mean", warmup=0.25,
    block_q=16, block_k=16, refresh=(), reuse=(), branches="separate",
)  # fmt: skip


def _for(pipe: Any, **changes: Any) -> Profile:
    """A profile that fits the pipeline, with a density of its own for every head."""
    density = torch.tensor([[[0.2, 0.4], [0.6, 0.8]]])
    fields: dict[str, Any] = {
        "fingerprint": fingerprint(pipe.transformer),
        "geometry": GRID,
        "density": {ANY_BRANCH: density},
        "orders": (("hwf", "fhw"), ("hwf", "hwf")),
        "dense_layers": (),
    }
    own = {
        key: changes.pop(key) for key in list(changes) if key in {f.name for f in dataclasses.fields(ComponentProfile)}
    }
    part = make_component(1, 2, 2, **{**fields, **own})
    return make_profile(part, **{"method": METHOD, "notes": (), **changes})


def test_every_head_computes_its_density_in_its_order(pipe: Any) -> None:
    with dit_accel.enable(pipe, profile=_for(pipe), min_tokens=0) as handle:
        pipe("a")
        layers = handle.stats()["transformer"].layers
    assert layers[0].head_density == pytest.approx([0.2, 0.4], abs=0.03)
    assert layers[1].head_density == pytest.approx([0.6, 0.8], abs=0.03)
    assert [layer.orders for layer in layers] == [["hwf", "fhw"], ["hwf", "hwf"]]


def test_branches_and_parts_have_densities_of_their_own(pipe: Any) -> None:
    shape = (2, 2, 2)
    density = {
        ANY_BRANCH: torch.tensor([0.2, 0.6])[:, None, None].expand(shape),
        "uncond": torch.tensor([0.4, 0.8])[:, None, None].expand(shape),
    }
    method = METHOD.replace(refresh=(0.5,))
    part = {"starts": (0.0, 0.5), "density": density, "orders": (), "curve": None}
    with dit_accel.enable(pipe, profile=_for(pipe, method=method, **part), min_tokens=0) as handle:
        pipe("a", num_inference_steps=8)
        by_step = handle.stats()["transformer"].density_by_step
    assert by_step[3] == pytest.approx((0.2 + 0.4) / 2 + 1 / 16, abs=0.03)
    assert by_step[7] == pytest.approx((0.6 + 0.8) / 2 + 1 / 16, abs=0.03)


def test_dense_layers_stay_dense(pipe: Any) -> None:
    with dit_accel.enable(pipe, profile=_for(pipe, dense_layers=(1,)), min_tokens=0) as handle:
        pipe("a")
        layers = handle.stats()["transformer"].layers
    assert layers[0].sparse
    assert not layers[1].sparse
    assert "dense layer" in layers[1].dense


def test_a_profile_from_disk_is_used_alike(pipe: Any, tmp_path: Path) -> None:
    _for(pipe).save(tmp_path)
    for given in (tmp_path, str(tmp_path), str(tmp_path / "profile.json")):
        with dit_accel.enable(pipe, profile=given, min_tokens=0) as handle:
            assert handle.method == METHOD
    with pytest.raises(FileNotFoundError, match="no profile at"):
        dit_accel.enable(pipe, profile=tmp_path / "nothing")


def test_another_grid_carries_over_and_says_so(pipe: Any) -> None:
    profile = _for(pipe, geometry=TokenGeometry((3, 8, 8)))
    with dit_accel.enable(pipe, profile=profile, min_tokens=0) as handle:
        for _ in range(2):
            pipe("a")
            status = handle.stats()["transformer"]
            assert status.layers[1].head_density == pytest.approx([0.6, 0.8], abs=0.03)
            assert status.notes == ["the profile was made on 3x8x8, this run has 5x8x8: densities carry over"]


def test_densities_below_a_block_are_raised() -> None:
    part = make_component(1, 1, 2, density={ANY_BRANCH: torch.tensor([[[0.01, 0.5]]])}, dense_layers=(), curve=None)
    fitted = fit(part, TokenGeometry((2, 8, 8), suffix=40), METHOD)  # 8 blocks and 3 of text
    assert fitted.density[ANY_BRANCH][0, 0].tolist() == pytest.approx([4 / 11, 0.5])
    assert "1 of 2 raised to 0.364" in fitted.notes[0]
    same = fit(part, part.geometry, METHOD)
    assert same.notes == []
    assert same.density is part.density


def test_another_class_is_refused_by_both_names(pipe: Any) -> None:
    profile = _for(pipe, model="FluxTransformer2DModel")
    with pytest.raises(ValueError, match="made for FluxTransformer2DModel, transformer is a WanTransformer3DModel"):
        dit_accel.enable(pipe, profile=profile)


def test_another_fingerprint_warns(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    known = fingerprint(pipe.transformer)
    other = dataclasses.replace(known, shapes="0" * 16)
    with caplog.at_level(logging.WARNING, "dit_accel"), dit_accel.enable(pipe, profile=_for(pipe, fingerprint=other)):
        pass
    assert "another WanTransformer3DModel than transformer (its shapes differ)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "dit_accel"), dit_accel.enable(pipe, profile=_for(pipe)):
        pass
    assert "fingerprint" not in caplog.text
    assert "another WanTransformer3DModel" not in caplog.text


def test_a_fingerprint_is_that_of_the_model_and_not_of_its_weights(pipe: Any) -> None:
    before = fingerprint(pipe.transformer)
    next(pipe.transformer.parameters()).data.add_(1)
    assert fingerprint(pipe.transformer) == before
    assert fingerprint(make_pipe(layers=3).transformer).differs(before) == "its config and shapes differ"


def test_other_counts_of_layers_and_heads_are_refused(pipe: Any) -> None:
    three = make_component(1, 3, 2, geometry=GRID, dense_layers=(), orders=())
    before = pipe.transformer.blocks[0].attn1.processor
    with pytest.raises(ValueError, match="holds 3 attention layers of WanTransformer3DModel, this one has 2"):
        dit_accel.enable(pipe, profile=make_profile(three, method=METHOD))
    assert pipe.transformer.blocks[0].attn1.processor is before
    heads = make_component(1, 2, 3, geometry=GRID, dense_layers=(), orders=())
    told = pytest.raises(ValueError, match="the profile has 3 heads in each layer, layer 0 has 2")
    with dit_accel.enable(pipe, profile=make_profile(heads, method=METHOD), min_tokens=0), told:
        pipe("a")


def test_other_components_are_refused(pipe: Any) -> None:
    profile = _for(pipe)
    two = dataclasses.replace(profile, components={**profile.components, "transformer_2": make_component()})
    with pytest.raises(ValueError, match="is for transformer, transformer_2, this pipeline has transformer"):
        dit_accel.enable(pipe, profile=two)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.3}, "a profile fixes|a profile says how much"),
        ({"run_density": 0.3}, "a profile says how much to compute; run_density"),
        ({"warmup": 0.1}, "a profile fixes the method; warmup"),
        ({"method": "sol"}, "made for method 'trial', got method='sol'"),
        ({"target_psnr": 35, "target_error": 0.1}, "give one of target_psnr, target_error"),
        ({"target_psnr": 35, "quality": "high"}, "give one of quality, target_psnr"),
    ],
)
def test_contradicting_wishes_raise(pipe: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dit_accel.enable(pipe, profile=_for(pipe), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_error": 0.1, "density": 0.3}, "give one of target_error, density"),
        ({"quality": "high", "run_density": 0.3}, "give one of quality, run_density"),
        ({"quality": "best"}, "quality must be one of 'high', 'balanced', 'fast', got 'best'"),
        ({"target_psnr": 3}, "target_psnr must be between 5 and 100 dB, got 3"),
        ({"target_error": 1.5}, "target_error must be above 0 and below 1"),
        ({"target_error": 0.1, "method": "paro"}, "is static"),
        ({"target_error": 0.1, "method": "gna"}, "target_error cannot go with method 'gna'.*is a pattern"),
        ({"target_error": 0.1, "method": "dense"}, "has no density"),
    ],
)
def test_bad_targets_raise(pipe: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dit_accel.enable(pipe, **options)


def test_a_smaller_error_costs_more_and_looks_better(pipe: Any) -> None:
    dense = pipe("a").frames
    found = []
    for options in ({"target_error": 0.3}, {"target_error": 0.05}, {"target_error": 0.01}):
        with dit_accel.enable(pipe, METHOD, min_tokens=0, **options) as handle:
            out = pipe("a").frames
            found.append((handle.stats()["transformer"].density, float((out - dense).norm() / dense.norm())))
    assert found[0][0] < found[1][0] < found[2][0]
    assert found[0][1] > found[1][1] > found[2][1]


def test_qualities_by_name_are_psnr_by_the_curve_that_ships(pipe: Any) -> None:
    densities = []
    for options in ({"quality": "fast"}, {"quality": "balanced"}, {"target_psnr": 35}, {"quality": "high"}):
        with dit_accel.enable(pipe, METHOD, min_tokens=0, **options) as handle:
            pipe("a")
            densities.append(handle.stats()["transformer"].density)
    assert densities[0] < densities[1] == densities[2] < densities[3]


def test_a_profile_takes_another_target(pipe: Any) -> None:
    profile = _for(pipe)
    for options, error in (({"target_error": 0.3}, 0.3), ({"target_psnr": 40}, 0.02), ({"quality": "high"}, 0.02)):
        with dit_accel.enable(pipe, profile=profile, min_tokens=0, **options) as handle:
            pipe("a")
            found = handle.stats()["transformer"].layers
        wanted = densities_for(profile.components["transformer"], METHOD, error=error)
        for layer in (0, 1):
            assert found[layer].head_density == pytest.approx(wanted[0, layer].tolist(), abs=0.04)


def test_densities_and_expected_errors_belong_together() -> None:
    part = make_component(2, 3, 4)
    for error in (0.5, 0.3, 0.1):
        density = densities_for(part, METHOD, error=error)
        assert 0.6 * error < expected_error(part, density) <= error * 1.001
    assert float(densities_for(part, METHOD, density=0.4).mean()) == pytest.approx(0.4, abs=0.01)
    with pytest.raises(ValueError, match="either an error or a density"):
        densities_for(part, METHOD)
    with pytest.raises(ValueError, match="holds no errors of attention"):
        densities_for(make_component(curve=None), METHOD, error=0.1)


def test_a_density_that_falls_keeps_its_steepness() -> None:
    part = make_component(3, 3, 4)
    falling = METHOD.replace(density=(0.6, 0.2), warmup=0.0)
    means = densities_for(part, falling, density=0.3).mean((1, 2)).tolist()
    assert means == pytest.approx([0.3 * x for x in (4 / 3, 1.0, 2 / 3)], abs=0.01)
    errors = densities_for(part, falling, error=0.2)
    for index, error in enumerate((0.15, 0.2, 0.3)):
        one = dataclasses.replace(
            part,
            starts=(0.0,),
            density={},
            curve=ErrorCurve(
                part.curve.densities, part.curve.error[:, index : index + 1], part.curve.output[index : index + 1]
            ),
        )
        assert torch.equal(errors[index], densities_for(one, METHOD, error=error)[0])


def test_one_density_for_a_layer_where_the_method_spreads_it() -> None:
    part = make_component(2, 3, 4)
    assert part.curve is not None
    joined = dataclasses.replace(part, curve=dataclasses.replace(part.curve, by_head=False))
    density = densities_for(joined, METHOD, error=0.2)
    assert torch.equal(density, density[..., :1].expand_as(density))
    assert len(set(density[..., 0].flatten().tolist())) > 1


@pytest.mark.parametrize(
    ("changes", "target", "message"),
    [
        ({"curve": None}, Target("psnr", 30.0), "holds no PSNR by error"),
        ({"control": "error"}, Target("density", 0.3), "takes no density"),
    ],
)
def test_targets_that_a_profile_cannot_have(changes: dict[str, Any], target: Target, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retarget(make_profile(**changes), target)


def test_a_target_beyond_what_was_measured_is_noted(pipe: Any) -> None:
    assert "lies outside of what the profile has measured" in retarget(_for(pipe), Target("psnr", 60.0)).notes[-1]
    assert retarget(_for(pipe), Target("psnr", 35.0)).notes == ()


def test_a_profile_prints_itself(pipe: Any) -> None:
    text = str(_for(pipe))
    assert "a test: trial for psnr:35, 20 steps" in text
    assert "WanTransformer3DModel, 2 layers of 2 heads at 5x8x8" in text
    assert "density of sparse steps 0.500 (heads 0.200 to 0.800)" in text


def test_anything_else_is_no_profile(pipe: Any) -> None:
    with pytest.raises(TypeError, match="profile must be a Profile, a path or a name on the Hub, got int"):
        dit_accel.enable(pipe, profile=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "asks"),
    [
        ({}, True),
        ({"quality": "high"}, True),
        ({"target_error": 0.1}, True),
        ({"method": "auto"}, False),
        ({"density": 0.3}, False),
        ({"run_density": 0.5}, False),
        ({"warmup": 0.5}, False),
        ({"min_tokens": 0}, False),
        ({"backend": "reference"}, False),
    ],
)
def test_only_what_was_left_to_us_asks_whether_it_pays(pipe: Any, options: dict[str, Any], asks: bool) -> None:
    with dit_accel.enable(pipe, **options) as handle:
        assert (handle.runs["transformer"].cost is not None) == asks


def test_a_profile_is_a_request(pipe: Any) -> None:
    with dit_accel.enable(pipe, profile=_for(pipe)) as handle:
        assert handle.runs["transformer"].cost is None
