"""Curves from PSNR to error, and targets as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.targets import QUALITIES, QualityCurve, QualityPoint, Target, parse_target, stock_curve

CURVE = QualityCurve(
    (QualityPoint(0.1, 28.0, 0.5), QualityPoint(0.01, 44.0, 0.9), QualityPoint(0.03, 37.0, 0.7)), "here"
)


def test_points_are_found_again_and_between_them_it_is_linear_in_the_logarithm() -> None:
    assert [p.error for p in CURVE.points] == [0.01, 0.03, 0.1]
    for point in CURVE.points:
        assert CURVE.error_for(point.psnr) == pytest.approx(point.error)
    assert CURVE.error_for(32.5) == pytest.approx((0.1 * 0.03) ** 0.5)


def test_beyond_the_ends_the_last_slope_goes_on() -> None:
    assert CURVE.error_for(51.0) == pytest.approx(0.01 * 0.01 / 0.03, rel=1e-3)
    assert CURVE.error_for(19.0) == pytest.approx(0.1 * 0.1 / 0.03, rel=1e-3)
    assert not CURVE.covers(51.0)
    assert CURVE.covers(30.0)


def test_one_point_gives_twenty_decibel_a_decade() -> None:
    curve = QualityCurve((QualityPoint(0.1, 30.0, 0.5),))
    assert curve.error_for(50.0) == pytest.approx(0.01)
    assert curve.error_for(30.0) == pytest.approx(0.1)


def test_points_out_of_order_are_joined() -> None:
    noisy = QualityCurve((QualityPoint(0.01, 40.0, 0.9), QualityPoint(0.02, 41.0, 0.8), QualityPoint(0.1, 30.0, 0.5)))
    errors = [noisy.error_for(db) for db in (45.0, 40.5, 35.0, 30.0, 25.0)]
    assert errors == sorted(errors)


@given(st.floats(5, 100), st.floats(5, 100))
def test_more_quality_never_takes_a_larger_error(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert CURVE.error_for(high) <= CURVE.error_for(low)


@pytest.mark.parametrize("psnr", [4, 101, float("nan"), "30", True])
def test_bad_psnr_raises(psnr: object) -> None:
    with pytest.raises(ValueError, match="target_psnr must be between 5 and 100"):
        CURVE.error_for(psnr)  # type: ignore[arg-type]


def test_round_trip_and_bad_data() -> None:
    assert QualityCurve.from_dict(CURVE.to_dict()) == CURVE
    for bad in ({}, {"points": [], "source": ""}, {"points": [{"error": 0.1}], "source": ""}):
        with pytest.raises(ValueError, match="curve"):
            QualityCurve.from_dict(bad)
    with pytest.raises(ValueError, match="error of a measured point"):
        QualityPoint(0.0, 30.0, 0.5)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("psnr:35", Target("psnr", 35.0)),
        ("error:0.05", Target("error", 0.05)),
        ("density:0.3", Target("density", 0.3)),
        ("density:1", Target("density", 1.0)),
        ("high", Target("psnr", QUALITIES["high"])),
        (Target("error", 0.1), Target("error", 0.1)),
    ],
)
def test_targets_as_text(text: str, target: Target) -> None:
    assert parse_target(text) == target
    assert parse_target(str(target)) == target


@pytest.mark.parametrize(
    "text", ["", "psnr", "psnr:3", "psnr:a", "psnr:30,40", "error:0", "error:2", "ssim:0.9", 35, None]
)
def test_bad_targets_raise(text: object) -> None:
    with pytest.raises(ValueError, match="a target is 'psnr:DB'"):
        parse_target(text)  # type: ignore[arg-type]


def test_the_curve_that_ships_and_the_warning_where_it_stands_in() -> None:
    curve, warning = stock_curve("WanTransformer3DModel")
    assert warning is None
    assert 0.001 < curve.error_for(40.0) < curve.error_for(30.0) < 0.5
    other, warning = stock_curve("FluxTransformer2DModel")
    assert other == curve
    assert warning is not None
    assert "no PSNR was measured on a FluxTransformer2DModel" in warning
