from __future__ import annotations

import diffusers
import pytest
import torch
import torch.nn.functional as functional
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from dit_accel.adapter import Adapter, StepInfo
from dit_accel.geometry import TokenGeometry
from dit_accel_patches import backend as backend_module
from dit_accel_patches.handles import ForwardState, LayerHandle, enter, find, leave
from dit_accel_patches.install import install


@pytest.fixture
def layer(make_run):
    """One layer outside any model, as if its processor were running."""
    import threading

    state = ForwardState(make_run())
    state.thread = threading.current_thread()
    state.run.begin_forward("none", StepInfo())
    member = backend_module.ensure_registered()
    handle = LayerHandle(state, 7, None, sdpa=False)
    previous = enter(handle)
    yield lambda q, k, v, **kw: dispatch_attention_fn(q, k, v, backend=member, **kw), state.run, handle
    leave(previous)


def qkv(batch=2, tokens=6, heads=2, keys=None, key_heads=None):
    shapes = [(batch, tokens, heads, 8)] + [(batch, keys or tokens, key_heads or heads, 8)] * 2
    return [torch.randn(shape) for shape in shapes]


def test_registration_is_idempotent_and_adds_one_entry():
    names, registry = attention_dispatch.AttentionBackendName, attention_dispatch._AttentionBackendRegistry
    active = registry._active_backend
    member = backend_module.ensure_registered()
    functions, count = dict(registry._backends), len(names.__members__)
    assert backend_module.ensure_registered() is member
    assert names("dit_accel") is member
    assert names.__members__["DIT_ACCEL"] is member
    assert (registry._backends, len(names.__members__)) == (functions, count)
    assert registry._active_backend is active


@pytest.mark.parametrize("shape", [(2, 6), (2, 1, 1, 6), (1, 1, 1, 6)])
def test_masks_of_valid_keys_reach_the_run(layer, shape):
    call, run, _ = layer
    q, k, v = qkv()
    mask = torch.rand(shape) > 0.3
    mask[..., 0] = True
    try:
        expected = dispatch_attention_fn(q, k, v, attn_mask=mask, backend="native")
    except RuntimeError:
        pytest.skip("native attention of this diffusers takes masks of four dimensions only")
    out = call(q, k, v, attn_mask=mask)
    assert torch.equal(out, expected)
    ((recorded),) = run.calls
    assert recorded.layer == 7
    assert torch.equal(recorded.key_valid, mask.view(-1, 6).expand(2, 6))


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.ones(2, 1, 6, 6, dtype=torch.bool), "mask of shape (2, 1, 6, 6) and torch.bool"),
        (torch.zeros(2, 2, 1, 6), "mask of shape (2, 2, 1, 6) and torch.float32"),
        (torch.zeros(2, 1, 1, 6), "mask of shape (2, 1, 1, 6) and torch.float32"),
    ],
)
def test_other_masks_stay_dense_with_a_reason(layer, mask, reason):
    call, run, _ = layer
    q, k, v = qkv()
    assert torch.equal(call(q, k, v, attn_mask=mask), dispatch_attention_fn(q, k, v, attn_mask=mask, backend="native"))
    assert not run.calls
    ((index, said),) = run.declined
    assert index == 7
    assert reason in said


@pytest.mark.parametrize(
    ("tensors", "options", "reason"),
    [
        (qkv(keys=4), {}, "not self-attention: query (2, 6, 2, 8), key (2, 4, 2, 8)"),
        (qkv(), {"is_causal": True}, "causal attention"),
        (qkv(key_heads=1), {"enable_gqa": True}, "grouped heads: 2 query heads on 1 key heads"),
        (qkv(), {"dropout_p": 1e-9}, "attention dropout 1e-09"),
    ],
    ids=["cross", "causal", "grouped", "dropout"],
)
def test_what_is_not_plain_self_attention_stays_dense(layer, tensors, options, reason):
    call, run, _ = layer
    out = call(*tensors, **options)
    torch.testing.assert_close(out, dispatch_attention_fn(*tensors, backend="native", **options))
    assert not run.calls
    assert run.declined == [(7, reason)]


def test_scale_is_passed_on(layer):
    call, _, _ = layer
    q, k, v = qkv()
    assert torch.equal(call(q, k, v, scale=0.1), dispatch_attention_fn(q, k, v, scale=0.1, backend="native"))


def test_output_is_contiguous_whatever_the_run_returns(layer):
    call, run, _ = layer
    q, k, v = qkv()
    run.attend = lambda query, *a, **kw: torch.zeros(2, 2, 6, 8).transpose(1, 2)
    assert call(q, k, v).is_contiguous()


def test_wrong_shape_from_the_run_is_refused(layer):
    call, run, _ = layer
    run.attend = lambda query, *a, **kw: query[:, :2].clone()
    with pytest.raises(RuntimeError, match=r"attend\(\) of layer 7 must return \(2, 6, 2, 8\)"):
        call(*qkv())


def test_a_layer_whose_model_is_gone_computes_dense(layer):
    _, run, _ = layer
    q, k, v = qkv()
    gone = torch.tensor(10**9)
    assert find(10**9) is None
    out = torch.ops.dit_accel.attend(q, k, v, gone, None, None, False, False)
    assert torch.equal(out, dispatch_attention_fn(q, k, v, backend="native"))
    assert not run.calls


def test_handles_are_not_kept_alive(make_run):
    handle = LayerHandle(ForwardState(make_run()), 0, None, sdpa=False)
    number = handle.number
    assert find(number) is handle
    del handle
    assert find(number) is None


def sd3():
    return diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    ).eval()


SD3 = Adapter(
    "sd3",
    ("SD3Transformer2DModel",),
    ("transformer_blocks",),
    ("attn",),
    lambda m, a, k: TokenGeometry((1, 4, 6), 0, 5),
)
SD3_INPUTS = {
    "hidden_states": torch.randn(1, 4, 4, 6),
    "encoder_hidden_states": torch.randn(1, 5, 32),
    "pooled_projections": torch.randn(1, 64),
    "timestep": torch.tensor([500.0]),
    "return_dict": False,
}


def test_models_that_call_sdpa_themselves(make_run, processors):
    from diffusers.models import attention_processor

    models, runs, installations = [sd3(), sd3()], [], []
    with torch.no_grad():
        expected = [m(**SD3_INPUTS)[0] for m in models]
        before = [processors(m) for m in models]
        for model in models:
            runs.append(make_run())
            installations.append(install(model, SD3, runs[-1]))
        assert attention_processor.F is not functional
        assert attention_processor.F.silu is functional.silu
        for model, wanted, run in zip(models, expected, runs, strict=True):
            assert torch.equal(model(**SD3_INPUTS)[0], wanted)
            assert run.layers == [0, 1]
            assert run.calls[0].shape == (1, 29, 4, 8)
        installations[0].undo()
        assert attention_processor.F is not functional
        installations[1].undo()
        assert attention_processor.F is functional
        for model, wanted, old in zip(models, expected, before, strict=True):
            assert torch.equal(model(**SD3_INPUTS)[0], wanted)
            assert all(processors(model)[name] is old[name] for name in old)


def test_legacy_fused_processors_are_wrapped_again(make_run, caplog):
    from diffusers.models import attention_processor

    model, run = sd3(), make_run()
    installation = install(model, SD3, run)
    with torch.no_grad():
        model.fuse_qkv_projections()
        with caplog.at_level("WARNING", logger="dit_accel"):
            fused = model(**SD3_INPUTS)[0]
        assert run.layers == [0, 1]
        assert "replaced by FusedJointAttnProcessor2_0" in caplog.text
        installation.undo()
        assert torch.equal(model(**SD3_INPUTS)[0], fused)
    assert attention_processor.F is functional


def test_sdpa_models_compile_to_one_graph(make_run):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, run = sd3(), make_run()
    with torch.no_grad():
        expected = model(**SD3_INPUTS)[0]
        installation = install(model, SD3, run)
        counter = CompileCounterWithBackend("eager")
        # The last block has another structure.
        model.transformer_blocks[0].compile(backend=counter, fullgraph=True)
        torch.testing.assert_close(model(**SD3_INPUTS)[0], expected)
    assert counter.frame_count == 1
    assert run.layers == [0, 1]
    installation.undo()
    torch._dynamo.reset()


def test_inductor_leaves_the_operators_out_of_its_cuda_graphs():
    import dit_accel_patches.cross
    import dit_accel_patches.op  # noqa: F401

    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip("this torch captures no graph with an input on the CPU")
    for operator in (torch.ops.dit_accel.attend.default, torch.ops.dit_accel.cross.default):
        assert torch.Tag.cudagraph_unsafe in operator.tags
