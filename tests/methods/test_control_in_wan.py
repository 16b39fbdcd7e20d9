"""Guidance and control methods in a diffusers transformer with sparse attention on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_accel

diffusers = pytest.importorskip("diffusers")

from diffusers.models.attention_dispatch import dispatch_attention_fn  # noqa: E402

TOKENS = 5 * 8 * 8


class Control:
    """A processor as control methods bring their own: with another prompt's keys, and a mask over keys."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, more: Tensor | None = None, valid: Tensor | None = None) -> None:
        self.more, self.valid = more, valid

    def __call__(self, attn: Any, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = attn.norm_q(attn.to_q(hidden)), attn.norm_k(attn.to_k(hidden)), attn.to_v(hidden)
        if self.more is not None:
            other = self.more.expand(hidden.shape[0], -1, -1)
            k = torch.cat([k, attn.norm_k(attn.to_k(other))], 1)
            v = torch.cat([v, attn.to_v(other)], 1)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        mask = None if self.valid is None else self.valid.expand(len(q), -1)[:, None, None]
        out = dispatch_attention_fn(q, k, v, attn_mask=mask, backend=self._attention_backend)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


@pytest.fixture
def wan() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    ).eval()


@torch.no_grad()
def _forward(model: nn.Module) -> Tensor:
    gen = torch.Generator().manual_seed(3)
    latent = torch.randn(2, 4, 5, 16, 16, generator=gen)
    text = torch.randn(2, 7, 16, generator=gen)
    return model(latent, torch.tensor([500.0, 500.0]), text, return_dict=False)[0]  # type: ignore[no-any-return]


def _hide() -> Tensor:
    valid = torch.ones(1, TOKENS, dtype=torch.bool)
    valid.view(1, 5, 8, 8)[:, :, 1:5, 2:6] = False
    return valid


def _control(kind: str) -> Control:
    more = torch.randn(1, 45, 64, generator=torch.Generator().manual_seed(5))
    if kind == "mask":
        return Control(valid=_hide())
    if kind == "keys":
        return Control(more)
    return Control(more, torch.cat([_hide(), torch.arange(45)[None] < 30], 1))


def _set(model: Any, control: Control) -> None:
    for block in model.blocks:
        block.attn1.processor = Control(control.more, control.valid)


@pytest.mark.parametrize("late", [False, True], ids=["before enable", "after enable"])
@pytest.mark.parametrize("kind", ["mask", "keys", "both"])
def test_control_processors_run_sparsely_and_right(wan: Any, kind: str, late: bool) -> None:
    control = _control(kind)
    if not late:
        _set(wan, control)
    options = {"order": "axes", "score": "mean_pool", "warmup": 0.0, "min_tokens": 0}
    handle = dit_accel.enable(wan, density=1.0, **options)
    if late:
        _set(wan, control)
    out = _forward(wan)
    status = handle.stats()["transformer"]
    assert status.sparse_calls == status.calls == 2, status.reasons
    handle.disable()
    dense = _forward(wan)
    torch.testing.assert_close(out, dense, atol=2e-4, rtol=1e-3)
    with dit_accel.enabled(wan, density=0.3, **options) as handle:
        sparse = _forward(wan)
        assert handle.stats()["transformer"].sparse_calls == 2
    assert torch.isfinite(sparse).all()
    assert not torch.allclose(sparse, dense, atol=1e-4)
    assert torch.cosine_similarity(sparse.flatten(), dense.flatten(), dim=0) > 0.9


def test_shared_keys_of_the_same_length_are_plain_attention(wan: Any) -> None:
    """DiTCtrl's other form: the keys of another prompt in place of one's own."""

    class Replaced(Control):
        def __call__(self, attn: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            q = attn.norm_q(attn.to_q(hidden)).unflatten(2, (attn.heads, -1))
            assert self.more is not None
            other = self.more.expand(len(q), -1, -1)
            k = attn.norm_k(attn.to_k(other)).unflatten(2, (attn.heads, -1))
            v = attn.to_v(other).unflatten(2, (attn.heads, -1))
            out = dispatch_attention_fn(q, k, v, backend=self._attention_backend)
            return attn.to_out[1](attn.to_out[0](out.flatten(2)))

    for block in wan.blocks:
        block.attn1.processor = Replaced(torch.randn(1, TOKENS, 64, generator=torch.Generator().manual_seed(8)))
    dense = _forward(wan)
    with dit_accel.enabled(wan, order="gilbert", score="mean_pool", density=1.0, warmup=0.0, min_tokens=0) as handle:
        torch.testing.assert_close(_forward(wan), dense, atol=2e-4, rtol=1e-3)
        assert handle.stats()["transformer"].sparse_calls == 2


class _Blended(Control):
    """The oracle of a blend: ``(1 - u) O + u V`` on some heads, inside the processor."""

    def __init__(self, u: float, heads: list[int], mask: Tensor | None = None) -> None:
        super().__init__()
        self.u, self.heads, self.mask = u, heads, mask

    def __call__(self, attn: Any, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = attn.norm_q(attn.to_q(hidden)), attn.norm_k(attn.to_k(hidden)), attn.to_v(hidden)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        out = dispatch_attention_fn(q, k, v, attn_mask=self.mask, backend=self._attention_backend)
        out = out.clone()
        out[:, :, self.heads] = (1 - self.u) * out[:, :, self.heads] + self.u * v[:, :, self.heads]
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


@pytest.mark.parametrize("method", ["composed", "dense", "declined"])
def test_a_blend_through_the_handle(wan: Any, method: str) -> None:
    """On sparse calls, on dense ones, and on those that never reach the planner for their mask."""
    mask = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool) if method == "declined" else None
    wan.blocks[0].attn1.processor = _Blended(0.0, [], mask)
    wan.blocks[1].attn1.processor = _Blended(0.35, [1])
    expected = _forward(wan)
    wan.blocks[0].attn1.processor = _Blended(0.0, [])
    wan.blocks[1].attn1.processor = _Blended(0.0, [], mask)
    bare = _forward(wan)
    slots: dict[str, Any] = {"method": "dense"} if method == "dense" else {"score": "mean_pool", "density": 1.0}
    handle = dit_accel.enable(wan, warmup=0.0, min_tokens=0, **slots)
    blend = handle.blend(0.35, {1: [1]})
    torch.testing.assert_close(_forward(wan), expected, atol=2e-4, rtol=1e-3)
    sparse = {"composed": 2, "dense": 0, "declined": 1}[method]
    assert handle.stats()["transformer"].sparse_calls == sparse
    assert not torch.allclose(expected, bare, atol=1e-3), "the blend must show"
    blend.remove()
    blend.remove()
    torch.testing.assert_close(_forward(wan), bare, atol=2e-4, rtol=1e-3)


def test_disable_takes_blends_away(wan: Any) -> None:
    before = _forward(wan)
    handle = dit_accel.enable(wan, "dense", min_tokens=0)
    handle.blend(1.0)
    assert not torch.allclose(_forward(wan), before, atol=1e-3)
    handle.disable()
    assert torch.equal(_forward(wan), before)
    with pytest.raises(ValueError, match="this handle is disabled"):
        handle.blend(0.5)
    with dit_accel.enabled(wan, "dense", min_tokens=0):
        assert torch.equal(_forward(wan), before)


def test_blends_for_transformers_that_do_not_exist(wan: Any) -> None:
    with dit_accel.enabled(wan, "dense", min_tokens=0) as handle:
        with pytest.raises(ValueError, match="component must be one of transformer, got 'transformer_2'"):
            handle.blend(0.5, component="transformer_2")
        with pytest.raises(ValueError, match=r"layers must lie in 0..1, got \[9\]"):
            handle.blend(0.5, {9: [0]})
