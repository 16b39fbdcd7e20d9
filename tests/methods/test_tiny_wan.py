"""Every preset runs on the trained tiny Wan, from one line, and says what it computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_accel
from dit_accel.presets import get_method, load_methods

pytest.importorskip("diffusers")

TINY_WAN = Path(__file__).resolve().parents[2] / "examples/tiny_wan"
NAMES = sorted(name for name, method in load_methods().items() if not method.is_dense)
CALL: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "num_frames": 17,
    "num_inference_steps": 4,
    "guidance_scale": 4.0,
    "output_type": "latent",
}
#: These need a plan or a trained scorer, and have tests of their own.
SPECIAL = {name for name in NAMES if get_method(name).static or "learned" in get_method(name).score}


@pytest.fixture(scope="module")
def pipe() -> Any:
    from dit_accel.demo.pipeline import load

    return load(TINY_WAN, torch.device("cpu"))


def _latents(pipe: Any) -> Tensor:
    found = pipe(prompt="octopus", generator=torch.Generator().manual_seed(0), **CALL).frames
    assert isinstance(found, Tensor)
    return found


@pytest.fixture(scope="module")
def dense(pipe: Any) -> Tensor:
    return _latents(pipe)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SPECIAL])
def test_preset_runs(name: str, pipe: Any, dense: Tensor) -> None:
    before = {key: id(module) for key, module in pipe.transformer.named_modules()}
    with dit_accel.enabled(pipe, name, density=0.4, min_tokens=0) as handle:
        sparse = _latents(pipe)
        (status,) = handle.stats().values()
    assert torch.isfinite(sparse).all()
    assert status.sparse_calls > 0, status.reasons
    assert not status.notes
    assert status.sparse_density < 1.0
    assert not torch.equal(sparse, dense)
    error = float((sparse - dense).norm() / dense.norm())
    assert error < 2.0, f"{name} is {error:.2f} from dense"
    assert {key: id(module) for key, module in pipe.transformer.named_modules()} == before


def test_slots_by_keyword(pipe: Any, dense: Tensor) -> None:
    """The composition of the issue: any order with any score, selection and compensation."""
    slots = {"order": "gilbert", "score": "antidiagonal", "select": "top_p:0.9", "compensate": "mean"}
    with dit_accel.enabled(pipe, min_tokens=0, **slots) as handle:
        sparse = _latents(pipe)
        (status,) = handle.stats().values()
    assert handle.method.name == "custom"
    assert status.sparse_calls > 0
    assert 0 < float((sparse - dense).norm()) < float(dense.norm())
