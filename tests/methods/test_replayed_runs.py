"""Whole runs of small transformers with replays and without: the same bits, on a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_accel
from dit_accel import replayed, settled
from dit_accel.presets import get_method, load_methods

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from _e2e_models import TOY, build, inputs

# Poison is written by an operation of torch, which no recording lets pass.
pytestmark = [pytest.mark.gpu, pytest.mark.no_poison]

STEPS = 8
LIVE = [name for name, method in load_methods().items() if not method.static and not method.is_dense]


def run(case: str, name: str, *, again: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], int]:
    """Outputs of forward calls at falling timesteps, and how often a replay was made."""
    device, count = torch.device("cuda"), 0
    model = build(TOY[case], TOY[case].layers, device, torch.bfloat16)
    given = inputs(TOY[case], device, torch.bfloat16)
    method = get_method(name)
    options: dict[str, Any] = {} if method.density is None else {"density": 0.4}

    def counting(real: Any) -> Any:
        def counts(*args: Any) -> Any:
            nonlocal count
            made = real(*args)
            count += made is not None
            return made

        return counts

    outputs = []
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(replayed.PlanReplays, "again", counting(replayed.PlanReplays.again))
        patch.setattr(settled.Settled, "__call__", counting(settled.Settled.__call__))
        if not again:
            patch.setenv(replayed.VARIABLE, "off")
        with dit_accel.enabled(model, name, min_tokens=0, warmup=0.0, **options) as handle:
            torch.manual_seed(0)
            for step in range(STEPS):
                timestep = torch.full((TOY[case].batch,), 900.0 - 90 * step, device=device)
                outputs.append(model(timestep=timestep, return_dict=False, **given)[0])
            if not next(iter(handle.stats().values())).sparse_calls:
                pytest.skip("no call of a model with so few layers is sparse")
    return outputs, count


@pytest.mark.parametrize("name", LIVE)
def test_bits_of_every_method(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        wanted, none = run("toy-wan", name, again=False, monkeypatch=monkeypatch)
    except ValueError as error:  # a preset that does not go with these options
        pytest.skip(str(error))
    got, replays = run("toy-wan", name, again=True, monkeypatch=monkeypatch)
    assert none == 0
    print(f"{name}: {replays} replays")
    for step, (mine, its) in enumerate(zip(got, wanted, strict=True)):
        assert torch.equal(mine, its), step


@pytest.mark.parametrize("name", ["auto", "adaspa"])
@pytest.mark.parametrize("case", ["toy-hunyuan", "toy-cog", "toy-flux"])
def test_bits_of_every_model(case: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, _ = run(case, name, again=False, monkeypatch=monkeypatch)
    got, replays = run(case, name, again=True, monkeypatch=monkeypatch)
    print(f"{case} {name}: {replays} replays")
    for step, (mine, its) in enumerate(zip(got, wanted, strict=True)):
        assert torch.equal(mine, its), step
