"""Guidance and control methods beside sparse attention: output blends, further keys, and masks over visual keys."""

from __future__ import annotations

import pytest
import torch
from driving import VIDEO, Tensors, layer_tensors, make_run, one_step, plain
from problems import HUNYUAN, make_plan, qkv
from torch import Tensor
from torch.nn import functional as F

from dit_accel.adapter import StepInfo
from dit_accel.blend import Blend
from dit_accel.geometry import TokenGeometry
from dit_accel.plan import execute
from dit_accel.presets import get_method
from dit_accel.runtime import ModelRun

#: Compositions of every kind of order and remainder; None is the model's own order.
METHODS: dict[str, dict[str, object]] = {
    "union": {},  # an order for each head, skipped blocks as means
    "auto": {},  # the same, corrected at mean queries behind the softmax
    "adaspa": {},
    "sol": {"order": "gilbert", "select": "top_k"},
    "pbs": {"select": "top_k"},  # keys of each head sorted by content
    "svg2": {"select": "top_k"},  # queries and keys of each head clustered
    "psa": {},  # levels of a pyramid
    "svg1": {},  # a pattern under an order of each head
    "pisa": {"order": "axes", "order_choice": "recall"},  # corrects the output
    "na": {"window": 5},
}
EXACT = [name for name in METHODS if name not in ("na", "svg1")]


def _oracle(tensors: Tensors, key_valid: Tensor | None) -> Tensor:
    """Masked softmax attention from its definition, ``[B, S, H, D]``."""
    q, k, v = (x.transpose(1, 2).double() for x in tensors)
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if key_valid is not None:
        logits = logits.masked_fill(~key_valid[:, None, None], -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).to(tensors[0].dtype)


def _sparse_run(name: str, density: float | None, **changes: object) -> ModelRun:
    return make_run(name, 1, **{"warmup": 0.0, "density": density, **METHODS[name], **changes})


def _call(run: ModelRun, tensors: Tensors, key_valid: Tensor | None, geometry: TokenGeometry, step: int = 0) -> Tensor:
    run.begin_forward(geometry, StepInfo(step=step, steps=4))
    return run.attend(
        *tensors, layer=0, scale=None, key_valid=key_valid, dense=lambda q, k, v: pytest.fail("must be sparse")
    )


def _tensors(geometry: TokenGeometry, batch: int = 1, more: int = 0, seed: int = 0) -> Tensors:
    q, k, v = (x.transpose(1, 2) for x in qkv(geometry, seed, heads=3, batch=batch))
    if more:
        gen = torch.Generator().manual_seed(99)
        shape = (batch, more, *k.shape[2:])
        k, v = (torch.cat([x, torch.randn(shape, generator=gen)], 1) for x in (k, v))
    return q, k, v


def _object_mask(geometry: TokenGeometry, batch: int, more: int = 0) -> Tensor:
    """A box of visual tokens is hidden, another one for each batch element, and the padding of the text."""
    frames, height, width = geometry.axes
    valid = torch.ones(batch, geometry.tokens + more, dtype=torch.bool)
    for i in range(batch):
        grid = valid[i, geometry.visual_slice].view(frames, height, width)
        grid[:, 2 + i : 7 + i, 3:9] = False
    if geometry.suffix:
        valid[:, geometry.tokens - 11 : geometry.tokens] = False
    if more:
        valid[:, -5:] = False
    return valid


# -- masks over visual keys (Attentive Eraser) ----------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", [VIDEO, HUNYUAN], ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_masked_keys_equal_masked_dense_attention(name: str, geometry: TokenGeometry) -> None:
    tensors, valid = _tensors(geometry, batch=2), _object_mask(geometry, 2)
    density = None if name == "psa" else 1.0
    changes = {"select": "levels_rank:1,1,1,1"} if name == "psa" else {}
    out = _call(_sparse_run(name, density, **changes), tensors, valid, geometry)
    torch.testing.assert_close(out, _oracle(tensors, valid), atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize("geometry", [VIDEO, HUNYUAN], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_masked_keys_are_never_seen(name: str, geometry: TokenGeometry) -> None:
    """At low density too: what the hidden keys hold changes nothing, and no query is left with nothing."""
    (q, k, v), valid = _tensors(geometry, batch=2), _object_mask(geometry, 2)
    out = _call(_sparse_run(name, 0.3), (q, k, v), valid, geometry)
    hidden = ~valid[:, :, None, None]
    other = (q, k, v.masked_fill(hidden, 1e4))
    torch.testing.assert_close(_call(_sparse_run(name, 0.3), other, valid, geometry), out)
    assert (out.abs().sum(-1) > 0).all()
    bare = _call(_sparse_run(name, 0.3), (q, k, v), None, geometry)
    assert _likeness(out, (q, k, v), valid) > _likeness(bare, (q, k, v), None) - 0.1


def _likeness(out: Tensor, tensors: Tensors, key_valid: Tensor | None) -> float:
    """Cosine of an output with that of dense attention."""
    return float(F.cosine_similarity(out.flatten(), _oracle(tensors, key_valid).flatten(), dim=0))


def test_a_mask_that_comes_and_goes() -> None:
    """The eraser masks some steps only: each kind of call has its own plan, and both are right."""
    tensors, valid = _tensors(VIDEO), _object_mask(VIDEO, 1)
    run = _sparse_run("union", 1.0)
    for step, mask in enumerate((None, valid, valid, None)):
        out = _call(run, tensors, mask, VIDEO, step)
        torch.testing.assert_close(out, _oracle(tensors, mask), atol=3e-4, rtol=1e-3)
    assert len(run.ledger.plans) == 2


def test_another_mask_is_noticed_a_step_later() -> None:
    tensors, valid = _tensors(VIDEO), _object_mask(VIDEO, 1)
    run = _sparse_run("sol", 0.4, reuse=())
    for step, mask in enumerate((valid, valid.clone(), valid.flip(1), valid.flip(1))):
        out = _call(run, tensors, mask, VIDEO, step)
        assert torch.isfinite(out).all()
        assert (out.abs().sum(-1) > 0).all()
    assert [plan.step for plan in run.ledger.plans] == [0, 3]


def test_queries_whose_keys_are_all_hidden_see_the_mean_value() -> None:
    """A window far inside the hidden box holds no key that may be seen."""
    geometry = TokenGeometry((1, 24, 24))
    q, k, v = _tensors(geometry)
    valid = torch.ones(1, geometry.tokens, dtype=torch.bool)
    valid.view(1, 24, 24)[:, 2:22, 2:22] = False
    out = _call(_sparse_run("na", None, window=3), (q, k, v), valid, geometry)
    middle = 12 * 24 + 12
    torch.testing.assert_close(out[:, middle], v[valid][None].mean(1), atol=1e-5, rtol=1e-4)
    corner = [0, 1, 2, 24, 25, 26, 48, 49, 50]
    edge = _oracle((q[:, :1], k[:, corner], v[:, corner]), valid[:, corner])
    torch.testing.assert_close(out[:, :1], edge, atol=1e-5, rtol=1e-4)


def test_a_plan_made_without_the_mask_is_carried_out_under_it() -> None:
    """Orders of each head and a mask: every head needs the mask in its own order."""
    tensors = qkv(VIDEO, heads=3, batch=2)
    plan = make_plan("union", VIDEO, tensors, density=1.0)
    assert plan.order is not None
    assert len(set(plan.order.head.tolist())) > 1, "the heads of this problem must choose differently"
    valid = _object_mask(VIDEO, 2)
    out = execute(plan, *tensors, scale=None, key_valid=valid, backend="reference")
    expected = F.scaled_dot_product_attention(*tensors, attn_mask=valid[:, None, None])
    torch.testing.assert_close(out, expected, atol=3e-4, rtol=1e-3)


def test_heads_share_an_order_only_where_visual_tokens_are_hidden() -> None:
    geometry = TokenGeometry((5, 9, 11), suffix=40)
    tensors = qkv(geometry, heads=3)
    padding = torch.ones(1, geometry.tokens, dtype=torch.bool)
    padding[:, -9:] = False
    heads = []
    for valid in (None, padding, _object_mask(geometry, 1)):
        plan = make_plan("union", geometry, tensors, key_valid=valid, density=0.4)
        assert plan.order is not None
        heads.append(plan.order.head.tolist())
    assert heads[0] == heads[1]
    assert len(set(heads[0])) > 1
    assert len(set(heads[2])) == 1


def test_what_a_mask_cannot_go_with_is_dense_and_says_so() -> None:
    run = make_run("pbs", 1, warmup=0.0, compensate="rectified")
    valid = _object_mask(VIDEO, 1)
    out = one_step(run, 0, 4, key_valid=valid)["cond", 0]
    torch.testing.assert_close(out, _oracle(layer_tensors(0), valid), atol=3e-4, rtol=1e-3)
    assert run.status().reasons == {"a key mask cannot follow the order of each head with compensate='rectified'": 1}


# -- further keys (DiTCtrl) -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", [name for name in EXACT if name != "pisa"])
def test_further_keys_equal_dense_attention_over_all(name: str, masked: bool) -> None:
    tensors = _tensors(HUNYUAN, batch=2, more=70)
    valid = _object_mask(HUNYUAN, 2, more=70) if masked else None
    density = None if name == "psa" else 1.0
    changes = {"select": "levels_rank:1,1,1,1"} if name == "psa" else {}
    out = _call(_sparse_run(name, density, **changes), tensors, valid, HUNYUAN)
    torch.testing.assert_close(out, _oracle(tensors, valid), atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "pisa"])
def test_further_keys_are_exact_at_low_density(name: str) -> None:
    """Keys that take all the attention: where they are exact, the output is theirs."""
    q, k, v = _tensors(VIDEO, more=64)
    k = k.clone()
    k[:, VIDEO.tokens :] = 0
    k[:, VIDEO.tokens] = 40 * F.normalize(q.mean(1), dim=-1)
    q = q + 12 * F.normalize(q.mean(1, keepdim=True), dim=-1)
    run = _sparse_run(name, 0.3)
    out = _call(run, (q, k, v), None, VIDEO)
    torch.testing.assert_close(out, _oracle((q, k, v), None), atol=0.05, rtol=0.05)
    if name != "na":  # a window of 5 x 5 x 5 touches nearly every block of so small a grid
        share = 64 / (VIDEO.tokens + 64)
        assert run.status().sparse_density < 0.5 * (1 - share) + share


def test_the_work_of_further_keys_is_counted() -> None:
    run = _sparse_run("sol", 0.25, compensate="drop")
    _call(run, _tensors(VIDEO, more=495), None, VIDEO)
    plain_run = _sparse_run("sol", 0.25, compensate="drop")
    _call(plain_run, _tensors(VIDEO), None, VIDEO)
    alone = plain_run.status().sparse_density
    assert run.status().sparse_density == pytest.approx((alone + 1) / 2)


def test_a_planning_step_sees_further_keys() -> None:
    run = make_run("adaspa", 1, warmup=0.5, density=1.0)
    tensors = _tensors(VIDEO, more=33)
    for step in range(3):
        run.begin_forward(VIDEO, StepInfo(step=step, steps=4))
        out = run.attend(*tensors, layer=0, scale=None, key_valid=None, dense=plain)
        torch.testing.assert_close(out, _oracle(tensors, None), atol=3e-4, rtol=1e-3)
    assert run.status().reasons == {"warm-up": 1, "planning step": 1}
    assert run.status().sparse_calls == 1


@pytest.mark.parametrize(
    ("name", "keys", "reason"),
    [
        ("sol", 400, "400 keys are fewer than the 495 tokens of the geometry"),
        ("pisa", 500, "compensate='pisa' corrects the output, which cannot be joined with that of further keys"),
    ],
)
def test_keys_that_cannot_be_served(name: str, keys: int, reason: str) -> None:
    run = make_run(name, 1, warmup=0.0)
    q, k, v = _tensors(VIDEO, more=10)
    run.begin_forward(VIDEO, StepInfo(step=0, steps=4))
    cut = (q, k[:, :keys], v[:, :keys])
    assert torch.equal(run.attend(*cut, layer=0, scale=None, key_valid=None, dense=plain), plain(*cut))
    assert run.status().reasons == {reason: 1}


# -- blends (SoftPAG) -----------------------------------------------------------------------------------------------------


def _blended_run(blend: Blend, density: float = 1.0, warmup: float = 0.5) -> ModelRun:
    run = make_run("sol", 2, warmup=warmup, density=density, compensate="drop")
    run.blends.append(blend)
    return run


def _identity_oracle(tensors: Tensors, u: float, heads: list[int]) -> Tensor:
    """``((1 - u) A + u I) V`` on some heads, from the definition."""
    q, k, v = (x.transpose(1, 2).double() for x in tensors)
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    for head in heads:
        weights[:, head] = (1 - u) * weights[:, head] + u * torch.eye(q.shape[2])
    return (weights @ v).transpose(1, 2).float()


def test_a_blend_is_the_perturbed_map_on_sparse_and_dense_steps() -> None:
    run = _blended_run(Blend(0.3, {1: [0]}))
    for step in range(4):
        out = one_step(run, step, 4)
        for layer, heads in ((0, []), (1, [0])):
            expected = _identity_oracle(layer_tensors(layer), 0.3, heads)
            torch.testing.assert_close(out["cond", layer], expected, atol=3e-4, rtol=1e-3)
    assert run.status().sparse_calls == 4


def test_a_blend_at_low_density_changes_what_the_kernel_gave_and_nothing_else() -> None:
    bare, run = _blended_run(Blend(0.0), 0.3, 0.0), _blended_run(Blend(0.4, {0: None, 1: [1]}), 0.3, 0.0)
    for step in range(2):
        was, out = one_step(bare, step, 4), one_step(run, step, 4)
        for layer, heads in ((0, [0, 1]), (1, [1])):
            expected = was["cond", layer].clone()
            expected[:, :, heads] = 0.6 * expected[:, :, heads] + 0.4 * layer_tensors(layer)[2][:, :, heads]
            torch.testing.assert_close(out["cond", layer], expected, atol=1e-6, rtol=1e-5)


def test_a_blend_keeps_to_its_steps_and_branch() -> None:
    run = _blended_run(Blend(1.0, steps=range(1, 3), branch="uncond"))
    for step in range(4):
        out = one_step(run, step, 4, branches=("cond", "uncond"))
        for branch in ("cond", "uncond"):
            q, k, v = layer_tensors(0, step, branch)
            blended = branch == "uncond" and step in (1, 2)
            torch.testing.assert_close(out[branch, 0], v if blended else plain(q, k, v), atol=3e-4, rtol=1e-3)
    unknown = one_step(run, None, None, branches=("uncond",))["uncond", 0]
    torch.testing.assert_close(unknown, plain(*layer_tensors(0, 0, "uncond")), atol=3e-4, rtol=1e-3)


def test_a_blend_takes_the_values_of_the_sequence_where_there_are_further_keys() -> None:
    run = make_run("sol", 1, warmup=0.0, density=1.0, compensate="drop")
    run.blends.append(Blend(1.0))
    tensors = _tensors(VIDEO, more=20)
    assert torch.equal(_call(run, tensors, None, VIDEO), tensors[2][:, : VIDEO.tokens])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1.5,), "u must be a number between 0 and 1, got 1.5"),
        ((True,), "u must be a number"),
        ((0.5, [1, 2]), "heads must map layer numbers"),
        ((0.5, {-1: [0]}), "numbers from 0, got -1"),
        ((0.5, {0: "all"}), "got 0: 'all'"),
        ((0.5, {0: [-2]}), r"got 0: \[-2\]"),
    ],
)
def test_bad_blends(arguments: tuple[object, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Blend(*arguments)  # type: ignore[arg-type]


def test_a_head_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match=r"heads of layer 0 must lie in 0..1, got \[7\]"):
        one_step(_blended_run(Blend(0.5, {0: [7]})), 0, 4)
    with pytest.raises(ValueError, match=r"layers must lie in 0..1, got \[5\]"):
        Blend(0.5, {5: None}).check(2)


def test_methods_of_this_file_are_what_they_say() -> None:
    """The cases above cover plans that fold, that share an order and that have none."""
    assert get_method("union").order_choice == "recall"
    assert get_method("pbs").content_order == "key_sort"
    assert get_method("psa").has_levels
