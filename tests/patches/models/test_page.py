"""What the documentation and the command line say of models is what the adapters say."""

from __future__ import annotations

import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest

import dit_accel
from dit_accel.registry import adapters
from dit_accel_patches.calls import make_rule
from dit_accel_patches.family import Family

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def page() -> Any:
    spec = importlib.util.spec_from_file_location("models_page", ROOT / "scripts/models_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(page: Any) -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run python scripts/models_page.py"


def test_the_page_names_every_class(page: Any) -> None:
    text = page.page()
    for adapter in adapters().values():
        for name in (*adapter.models, *getattr(adapter, "refused", {})):
            assert name == "ModelMixin" or f"`{name}`" in text


def test_rows_are_json_and_complete() -> None:
    rows = dit_accel.supported_models()
    assert json.loads(json.dumps(rows))
    names = [row["model"] for row in rows]
    assert len(names) == len(set(names))
    assert all(row["note"] for row in rows)


@pytest.mark.parametrize("adapter", adapters().values(), ids=lambda adapter: adapter.name)
def test_an_adapter_is_complete(adapter: Any) -> None:
    assert isinstance(adapter, Family)
    make_rule(adapter.calls)
    for name in adapter.models:
        if name == "ModelMixin" or not hasattr(diffusers, name):  # an older diffusers
            continue
        source = inspect.getsource(inspect.getmodule(getattr(diffusers, name)))
        assert all(f"self.{blocks} = nn.ModuleList(" in source for blocks in adapter.blocks) or len(adapter.models) > 1
    if adapter.name != "generic":
        assert adapter.head_dim
        assert set(adapter.head_dim) <= {64, 72, 88, 96, 128, 256}


@pytest.mark.skipif(not hasattr(diffusers, "Flux3Transformer2DModel"), reason="needs diffusers 0.42")
def test_every_transformer_of_diffusers_has_an_answer() -> None:
    """Each class for pictures and video is served, refused with a reason, or left to the generic adapter knowingly."""
    # Sound, proteins, language and building blocks of UNets; and classes whose masks keep them dense.
    others = {
        "AceStepTransformer1DModel",
        "BriaFibo2Transformer2DModel",
        "DreamLiteTransformer2DModel",
        "DualTransformer2DModel",
        "Ideogram4Transformer2DModel",
        "LongCatAudioDiTTransformer",
        "LuminaNextDiT2DModel",
        "MiniMaxMusic3Transformer1DModel",
        "OmniGenTransformer2DModel",
        "PriorTransformer",
        "RFD4ProteinaTransformer",
        "SanaWMLTX2RefinerTransformer3DModel",
        "StableAudioDiTModel",
        "StableAudio3DiTModel",
        "Transformer2DModel",
        "TransformerTemporalModel",
    }
    known = {name for a in adapters().values() for name in (*a.models, *getattr(a, "refused", {}))}
    found = {
        name
        for name in dir(diffusers)
        if ("Transformer" in name or "DiT" in name)
        and inspect.isclass(cls := getattr(diffusers, name))
        and issubclass(cls, diffusers.ModelMixin)
        and ".transformers." in cls.__module__
    }
    assert found - known - others == set()
