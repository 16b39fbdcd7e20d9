"""The precision slot: its spelling, its place in a method, and what it cannot go with."""

from __future__ import annotations

import pytest

from dit_accel.method import Method
from dit_accel.precision import parse_precision
from dit_accel.presets import get_method, load_methods
from dit_accel_kernels.quantize import PRECISIONS, Precision


@pytest.mark.parametrize("name", PRECISIONS)
def test_names_are_those_of_the_kernels(name: str) -> None:
    rule = parse_precision(name)
    assert rule.fixed == PRECISIONS[name]
    assert not rule.wide
    assert rule.candidates == ()


def test_options_of_a_format() -> None:
    assert parse_precision("int8_fp8:rotate=true,smooth=false").fixed == Precision("int8", "fp8", False, True)
    assert parse_precision("bf16").wide


def test_auto_tries_in_turn() -> None:
    rule = parse_precision("auto")
    assert [name for name, _ in rule.candidates] == ["int8_fp8", "int8"]
    assert rule.fixed is None
    assert not rule.wide
    one = parse_precision("auto:int4,error=0.02,rotate=true")
    assert one.candidates == (("int4", Precision("int4", "bf16", True, True)),)
    assert one.max_error == 0.02


@pytest.mark.parametrize(
    "text",
    ["int9", "bf16:rotate=true", "int8:0.5", "int8:smoth=true", "int8:rotate=2", "auto:bf16", "auto:error=2", 8, None],
)
def test_what_is_not_a_precision(text: object) -> None:
    with pytest.raises(ValueError, match="precision"):
        get_method("union").replace(precision=text)


def test_round_trip_and_files_without_the_field() -> None:
    method = get_method("union").replace(precision="auto:int8,error=0.03")
    assert Method.from_json(method.to_json()) == method
    assert "precision   auto:int8,error=0.03" in str(method)
    old = get_method("union").to_dict()
    del old["precision"]
    assert Method.from_dict(old).precision == "bf16"
    assert "precision" not in str(get_method("union"))


def test_presets() -> None:
    narrow = {name: m.precision for name, m in load_methods().items() if not m.precision_rule.wide}
    assert narrow == {"paro_int8": "int8_int8", "paro_int4": "int4_int8:rotate=true"}
    for name in narrow:
        plain = get_method("paro")
        changes = {"name": name, "summary": get_method(name).summary, "precision": narrow[name]}
        assert plain.replace(density=get_method(name).density, **changes) == get_method(name)


@pytest.mark.parametrize(
    ("name", "slot"),
    [("na", "score='window'"), ("anchor", "score='stripes:12'"), ("psa", "select="), ("adaspa", None), ("sale", None)],
)
def test_what_it_cannot_go_with(name: str, slot: str | None) -> None:
    """Token windows and gathered keys are 16-bit: an error where a format was named, no change under ``"auto"``."""
    method = get_method(name)
    assert method.replace(precision="auto").precision_rule.candidates
    if slot is None:
        assert method.replace(precision="int8").precision_rule.fixed
        return
    with pytest.raises(ValueError, match=rf"precision='int8' cannot go with {slot}.*use precision='bf16'"):
        method.replace(precision="int8")


def test_dense_in_8_bits_is_not_dense() -> None:
    """Dense 8-bit attention is the sparse call with all blocks."""
    assert get_method("dense").is_dense
    assert not get_method("dense").replace(precision="int8").is_dense
