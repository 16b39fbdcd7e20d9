"""What cannot be exchanged goes to the user's backend, with a reason; processes are one here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_accel.geometry import TokenGeometry
from dit_accel.presets import get_method
from dit_accel.runtime import ModelRun
from dit_accel_patches.parallel import Spread, find_config
from dit_accel_patches.parallel_exchange import Ranks
from dit_accel_patches.parallel_heads import SharedHeads

GEOMETRY = TokenGeometry((2, 4, 4))


class Transformer(nn.Module):
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        return hidden_states


def spread(geometry: TokenGeometry | str, size: int = 2) -> Spread:
    found = Spread.__new__(Spread)
    found.config, found.ranks = object(), Ranks(None, 0, size)
    found._split, found._shares, found._note = frozenset(), {}, ""
    found.begin(Transformer(), (torch.zeros(1, 1, 1),), {}, geometry)
    return found


class Run:
    def __init__(self) -> None:
        self.declined: list[str] = []

    def decline(self, layer: int, reason: str) -> None:
        self.declined.append(reason)


def tensors(tokens: int, heads: int = 4) -> list[Tensor]:
    return [torch.randn(1, tokens, heads, 8) for _ in range(3)]


@pytest.mark.parametrize(
    ("geometry", "qkv", "mask", "word"),
    [
        ("no grid", tensors(16), None, "no grid"),
        (GEOMETRY, tensors(15), None, "15 tokens"),
        (GEOMETRY, tensors(16, 1), None, "use at most 1"),
        (GEOMETRY, [tensors(16)[0], *tensors(20)[1:]], None, "differ"),
        (GEOMETRY, [tensors(16)[0], *tensors(16, 2)[1:]], None, "differ"),
        (GEOMETRY, tensors(16), torch.ones(1, 1, 16, 16, dtype=torch.bool), "mask"),
        (GEOMETRY, tensors(16), torch.zeros(1, 4, 1, 16), "mask"),
        (GEOMETRY, tensors(16), torch.ones(1, 9, dtype=torch.bool), "mask"),
    ],
)
def test_the_users_backend_gets_what_cannot_be_exchanged(geometry: Any, qkv: Any, mask: Any, word: str) -> None:
    run, asked = Run(), []

    def as_is(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
        asked.append((q, k, v, m))
        return q + 1

    def here(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
        raise AssertionError("must not be exchanged")

    handle = SimpleNamespace(state=SimpleNamespace(run=run), index=3)
    out = spread(geometry).attend(*qkv, mask, handle, here, as_is)
    assert torch.equal(out, qkv[0] + 1)
    assert asked[0][3] is mask
    assert word in run.declined[0]


def test_attention_that_every_process_repeats_is_left_alone() -> None:
    from dit_accel_patches.backend import ensure_registered
    from dit_accel_patches.handles import ForwardState, LayerHandle
    from dit_accel_patches.op import attend

    ensure_registered()
    run: Any = Run()
    state = ForwardState(run)
    handle = LayerHandle(state, 0, None, sdpa=True)
    q, k, v = tensors(16)
    with pytest.raises(RuntimeError, match="outside a forward call"):
        attend(q, k, v, handle.layer, None, None, False, False, True)
    state.spread = spread(GEOMETRY)
    out = attend(q, k, v, handle.layer, None, None, False, False)
    heads = (x.transpose(1, 2) for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)
    assert torch.allclose(out, want, atol=1e-6)
    assert "not spread" in run.declined[0]


def test_the_configuration_is_found_where_diffusers_puts_it() -> None:
    config = SimpleNamespace(context_parallel_config=object())
    tensor_parallel = SimpleNamespace(context_parallel_config=None)
    assert find_config([object(), SimpleNamespace(_parallel_config=config)]) is config
    assert find_config([SimpleNamespace(_parallel_config=tensor_parallel), None]) is None


def test_calibration_wants_one_process() -> None:
    run = ModelRun(get_method("paro"))
    run.recorder = object()  # type: ignore[assignment]
    share = SharedHeads(Ranks(None, 0, 2), 4, torch.device("cpu"))
    with pytest.raises(ValueError, match="without context parallelism"):
        run.spread(share)
    run.recorder = None
    run.spread(share)
    assert run.share is share
    run.spread(None)
    assert run.share is None


def test_targets_are_refused() -> None:
    share = SharedHeads(Ranks(None, 0, 2), 4, torch.device("cpu"))
    assert "density" in str(share.why_not(get_method("auto"), True))
    assert share.why_not(get_method("auto"), False) is None
