"""The public names, so that none appears or vanishes unnoticed, each with types and a docstring."""

from __future__ import annotations

import dataclasses
import enum
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import dit_accel
import dit_accel_kernels
from dit_accel.options import MethodOptions

# To change the public API: change this list, the changelog and docs/reference/ in the same commit.
PUBLIC = [
    "Adapter",
    "Blend",
    "BlockFeatures",
    "BlockMask",
    "Gate",
    "GateInfo",
    "Handle",
    "LayerStatus",
    "Method",
    "Profile",
    "Proposal",
    "RunStatus",
    "Simulation",
    "StaticPlan",
    "StepInfo",
    "TokenGeometry",
    "__version__",
    "block_sparse_attention",
    "calibrate",
    "disable",
    "enable",
    "enabled",
    "methods",
    "propose",
    "register_method",
    "register_scorer",
    "set_verbosity",
    "simulate",
    "status",
    "supported_models",
]


def _callables(module: ModuleType) -> Iterator[Any]:
    """Public functions, and public classes with their public methods, as pytest parameters."""
    for name in sorted(module.__all__):
        thing = getattr(module, name, None)  # a missing name has a test of its own
        label = f"{module.__name__}.{name}"
        if inspect.isclass(thing):
            yield pytest.param(thing, id=label)
            for member, value in vars(thing).items():
                value = getattr(value, "__func__", value)
                if not member.startswith("_") and inspect.isfunction(value):
                    yield pytest.param(value, id=f"{label}.{member}")
        elif callable(thing):
            yield pytest.param(thing, id=label)


EVERYTHING = [*_callables(dit_accel), *_callables(dit_accel_kernels)]


def test_names_are_pinned() -> None:
    assert sorted(dit_accel.__all__) == sorted(PUBLIC)


def test_keywords_of_enable_have_the_types_of_all_fields() -> None:
    fields = {field.name for field in dataclasses.fields(dit_accel.Method)} - {"version"}
    assert set(MethodOptions.__annotations__) == fields
    assert inspect.signature(dit_accel.enable).parameters["overrides"].annotation == "Unpack[MethodOptions]"


@pytest.mark.parametrize("module", [dit_accel, dit_accel_kernels], ids=lambda module: module.__name__)
def test_every_name_exists_once(module: ModuleType) -> None:
    assert len(set(module.__all__)) == len(module.__all__)
    missing = [name for name in module.__all__ if not hasattr(module, name)]
    assert not missing


@pytest.mark.parametrize("thing", EVERYTHING)
def test_has_a_docstring(thing: Any) -> None:
    doc = inspect.getdoc(thing) if inspect.isclass(thing) else thing.__doc__
    assert doc
    assert doc.strip()
    if dataclasses.is_dataclass(thing):
        generated = f"{thing.__name__}("
        assert not doc.startswith(generated), "the docstring is the one that dataclass makes"


@pytest.mark.parametrize("thing", EVERYTHING)
def test_is_annotated(thing: Any) -> None:
    """Every parameter and every result. Generated constructors are annotated by their fields."""
    if inspect.isclass(thing):
        if dataclasses.is_dataclass(thing) or issubclass(thing, (enum.Enum, tuple, Exception)):
            return
        thing = vars(thing).get("__init__")
        if thing is None or not inspect.isfunction(thing):
            return
    try:
        signature = inspect.signature(thing)
    except ValueError:
        return
    bare = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.annotation is parameter.empty and name not in ("self", "cls")
    ]
    assert not bare
    assert signature.return_annotation is not signature.empty
