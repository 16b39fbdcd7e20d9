"""Masks that layers share are compared once in a forward call."""

from __future__ import annotations

import pytest
import torch

from dit_accel import layer_state
from dit_accel.layer_state import LayerState, MaskFlags


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[layer_state.DeferredFlag]:
    flags: list[layer_state.DeferredFlag] = []
    real = layer_state.DeferredFlag

    def counting(flag: torch.Tensor) -> layer_state.DeferredFlag:
        flags.append(real(flag))
        return flags[-1]

    monkeypatch.setattr(layer_state, "DeferredFlag", counting)
    return flags


def test_one_comparison_for_all_layers_of_a_forward_call(made: list[layer_state.DeferredFlag]) -> None:
    masks, before = MaskFlags(), torch.ones(2, 8, dtype=torch.bool)
    now = before.clone()
    assert masks.differ(now, before) is masks.differ(now[:], before[:])
    assert len(made) == 1
    assert not made[0].read()
    assert masks.differ(now[:1], before[:1]) is not made[0]
    masks.clear()
    masks.differ(now, before)
    assert len(made) == 3


def test_a_mask_that_was_written_to_is_compared_again(made: list[layer_state.DeferredFlag]) -> None:
    masks, before = MaskFlags(), torch.ones(1, 8, dtype=torch.bool)
    now = before.clone()
    assert not masks.differ(now, before).read()
    now[0, 3] = False
    assert masks.differ(now, before).read()


def test_masks_of_another_call_do_not_take_the_place_of_one(made: list[layer_state.DeferredFlag]) -> None:
    masks, before = MaskFlags(), torch.ones(1, 64, dtype=torch.bool)
    for hidden in range(8):
        now = before.clone()
        now[0, :hidden] = False
        assert masks.differ(now, before).read() == (hidden > 0)
        del now  # its memory must not be given to the next


def test_masks_of_inference_mode(made: list[layer_state.DeferredFlag]) -> None:
    masks = MaskFlags()
    with torch.inference_mode():
        now, before = torch.ones(1, 8, dtype=torch.bool), torch.ones(1, 8, dtype=torch.bool)
        assert not masks.differ(now, before).read()
        now[0, 0] = False
        assert masks.differ(now, before).read()


def test_layers_watch_by_it(made: list[layer_state.DeferredFlag]) -> None:
    masks, before = MaskFlags(), torch.ones(1, 8, dtype=torch.bool)
    now = before.clone()
    now[0, 0] = False
    layers = [LayerState(key_valid=before[:], branch="cond") for _ in range(3)]
    for state in layers:
        state.watch(torch.zeros(1, 1, 8, 4), now[:], 0.0, "cond", masks)
    assert len(made) == 1
    assert all(state.has_turned() for state in layers)
