"""Makes the stand-ins for ComfyUI importable as ``comfy_fakes``, and gives tests both contracts."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

_PATH = Path(__file__).with_name("fakes.py")
if "comfy_fakes" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("comfy_fakes", _PATH)
    assert _spec is not None
    assert _spec.loader is not None
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["comfy_fakes"] = _module
    _spec.loader.exec_module(_module)


@pytest.fixture(params=["old", "new"])
def core(request: pytest.FixtureRequest) -> str:
    """``"old"`` is the contract of ComfyUI 0.3.64, ``"new"`` that of 0.35 to 0.38."""
    return str(request.param)


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The log of the nodes."""
    with caplog.at_level(logging.INFO, logger="dit_accel"):
        yield caplog
