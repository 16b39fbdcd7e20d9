"""Makes the tiny transformers in ``zoo`` importable as ``model_zoo``, without an import of ``tests``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")
# Tensors of a few numbers: threads only get into each other's way.
torch.set_num_threads(1)

_FOLDER = Path(__file__).parent / "zoo"
if "model_zoo" not in sys.modules:
    _spec = importlib.util.spec_from_file_location(
        "model_zoo", _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)]
    )
    assert _spec is not None
    assert _spec.loader is not None
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["model_zoo"] = _module
    _spec.loader.exec_module(_module)

Forward = Callable[[nn.Module, dict[str, Any]], list[Tensor]]


@pytest.fixture
def forward() -> Forward:
    """One forward call; all tensors that come out."""

    def call(model: nn.Module, arguments: dict[str, Any]) -> list[Tensor]:
        with torch.no_grad():
            found = model(**arguments, return_dict=False)
        tensors: list[Tensor] = []
        for item in found if isinstance(found, tuple | list) else [found]:
            tensors += [item] if isinstance(item, Tensor) else list(item or ())
        return tensors

    return call


@pytest.fixture
def make() -> Callable[[str], tuple[nn.Module, dict[str, Any]]]:
    """A case of the zoo by name."""
    from model_zoo import MAKERS

    def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
        torch.manual_seed(0)
        try:
            model, arguments = MAKERS[name]()
        except AttributeError as error:
            if "module diffusers has no attribute" not in str(error):
                raise
            pytest.skip(f"this version of {error}".replace("module diffusers has", "diffusers has"))
        # Fresh models have gates and output layers of zeros, behind which attention would make no difference, and padding
        # tokens that were never written.
        for parameter in model.parameters():
            written = bool(parameter.isfinite().all()) and float(parameter.abs().max()) < 10.0
            if not written or not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
        return model.eval(), arguments

    return build
