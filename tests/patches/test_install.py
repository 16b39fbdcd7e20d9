from __future__ import annotations

import inspect
import threading

import pytest
import torch

from dit_accel.adapter import Adapter
from dit_accel_patches.flux import ADAPTER as FLUX
from dit_accel_patches.install import install
from dit_accel_patches.processor import handle_of
from dit_accel_patches.wan import ADAPTER as WAN


def same(a, b):
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)


@pytest.mark.parametrize("family", ["wan", "flux"])
def test_passthrough_is_bit_equal_and_undo_is_exact(family, request, make_run, processors):
    tiny = request.getfixturevalue(family)
    adapter = {"wan": WAN, "flux": FLUX}[family]
    expected = tiny()
    before, attributes = processors(tiny.model), dict(tiny.model.__dict__)
    hooks = {name: dict(value) for name, value in attributes.items() if name.endswith("hooks")}
    run = make_run()
    installation = install(tiny.model, adapter, run, pipe=tiny.pipe)
    assert len(installation.layers) == {"wan": 2, "flux": 3}[family]
    assert torch.equal(tiny(), expected)
    forwards = {"wan": 4, "flux": 3}[family]
    assert run.layers == list(range(len(installation.layers))) * forwards
    assert not run.declined
    installation.undo()
    installation.undo()
    assert same(processors(tiny.model), before)
    calls = len(run.calls)
    assert torch.equal(tiny(), expected)
    assert len(run.calls) == calls
    assert "_dit_accel" not in tiny.model.__dict__
    assert "forward" not in tiny.model.__dict__
    assert {name: dict(tiny.model.__dict__[name]) for name in hooks} == hooks
    assert tiny.model.__dict__.keys() - {"_diffusers_hook"} == attributes.keys() - {"_diffusers_hook"}


def test_undo_leaves_no_registry_on_a_model_that_had_none(make_wan, make_run):
    model = make_wan()
    keys = set(model.__dict__)
    install(model, WAN, make_run()).undo()
    assert set(model.__dict__) == keys


@pytest.mark.parametrize("family", ["wan", "flux"])
def test_the_run_decides_the_output(family, request, make_run):
    tiny = request.getfixturevalue(family)
    expected = tiny()
    install(tiny.model, {"wan": WAN, "flux": FLUX}[family], make_run("zeros"), pipe=tiny.pipe)
    assert not torch.equal(tiny(), expected)


def test_only_self_attention_is_wrapped(wan, make_run, processors):
    install(wan.model, WAN, make_run())
    wrapped = {name for name, processor in processors(wan.model).items() if handle_of(processor)}
    assert wrapped == {"blocks.0.attn1", "blocks.1.attn1"}


def test_nothing_global_changes(wan, make_wan, make_run, wan_inputs):
    from diffusers.models import attention_dispatch
    from diffusers.models.transformers import transformer_wan

    registry = attention_dispatch._AttentionBackendRegistry
    active, call = registry._active_backend, transformer_wan.WanAttnProcessor.__call__
    functional, other = transformer_wan.F, make_wan()
    with torch.no_grad():
        expected = other(**wan_inputs).sample
    run = make_run("zeros")
    install(wan.model, WAN, run)
    wan()
    count = len(run.calls)
    with torch.no_grad():
        assert torch.equal(other(**wan_inputs).sample, expected)
    assert len(run.calls) == count
    assert registry._active_backend is active
    assert transformer_wan.WanAttnProcessor.__call__ is call
    assert transformer_wan.F is functional is torch.nn.functional
    assert not hasattr(torch.nn.functional, "_dit_accel")


def test_second_install_is_refused_by_name(wan, make_run):
    install(wan.model, WAN, make_run())
    with pytest.raises(RuntimeError, match="accelerated already, by the wan adapter"):
        install(wan.model, WAN, make_run())


def test_wrong_adapter_is_refused_and_leaves_nothing(wan, make_run):
    nothing = Adapter("none", ("X",), ("layers",), ("attn",), WAN.geometry)
    keys = set(wan.model.__dict__)
    with pytest.raises(ValueError, match=r"no self-attention that could be accelerated: none at layers\.\*\.attn"):
        install(wan.model, nothing, make_run())
    assert set(wan.model.__dict__) == keys


def test_reinstall_after_undo(wan, make_run):
    expected = wan()
    install(wan.model, WAN, make_run("zeros")).undo()
    run = make_run()
    install(wan.model, WAN, run)
    assert torch.equal(wan(), expected)
    assert run.calls


def test_signature_of_the_processor_survives(flux, make_run, processors):
    before = {n: inspect.signature(p.__call__) for n, p in processors(flux.model).items()}
    install(flux.model, FLUX, make_run())
    after = {n: inspect.signature(p.__call__) for n, p in processors(flux.model).items()}
    assert before == after
    assert "image_rotary_emb" in next(iter(after.values())).parameters


def test_shared_processor_is_split_and_restored(wan, make_run, processors):
    shared = wan.model.blocks[0].attn1.processor
    wan.model.set_attn_processor(shared)
    expected = wan()
    run = make_run()
    installation = install(wan.model, WAN, run)
    assert torch.equal(wan(), expected)
    assert set(run.layers) == {0, 1}
    installation.undo()
    assert {id(p) for p in processors(wan.model).values()} == {id(shared)}


def test_geometry_errors_are_a_reason_not_a_crash(wan, make_run):
    def broken(module, args, kwargs):
        raise KeyError("grid")

    run = make_run()
    install(wan.model, Adapter("odd", ("X",), ("blocks",), ("attn1",), broken), run)
    wan()
    assert {g for g, _ in run.forwards} == {"the odd adapter could not read the geometry: 'grid'"}


def test_exception_inside_attention_leaves_clean_state(wan, make_run):
    expected = wan()
    run = make_run()
    installation = install(wan.model, WAN, run)
    run.raise_at = 1
    with pytest.raises(ZeroDivisionError):
        wan()
    run.raise_at = None
    from dit_accel_patches.handles import current

    assert current() is None
    failed = []
    thread = threading.Thread(target=lambda: failed.append(not torch.equal(wan(), expected)))
    thread.start()
    thread.join()
    assert failed == [False]
    assert run.steps[-4:] == [(0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond")]
    installation.undo()
    assert torch.equal(wan(), expected)


def test_second_thread_on_one_model_is_refused(wan, make_run, wan_inputs):
    inside, go = threading.Event(), threading.Event()

    class Slow(make_run):
        def attend(self, *args, **kwargs):
            inside.set()
            go.wait(10)
            return super().attend(*args, **kwargs)

    install(wan.model, WAN, Slow())
    errors = []

    def call():
        try:
            with torch.no_grad():
                wan.model(**wan_inputs)
        except RuntimeError as error:
            errors.append(str(error))

    first = threading.Thread(target=call, name="first")
    first.start()
    assert inside.wait(10)
    second = threading.Thread(target=call, name="second")
    second.start()
    second.join(10)
    go.set()
    first.join(10)
    assert len(errors) == 1
    assert "thread second called a transformer" in errors[0]
    call()
    assert len(errors) == 1


def test_two_models_in_two_threads_do_not_mix(make_wan, make_run, wan_inputs):
    models = [make_wan(4) for _ in range(2)]
    runs = [make_run(), make_run()]
    barrier = threading.Barrier(2)

    def work(model, run):
        install(model, WAN, run)
        barrier.wait(10)
        with torch.no_grad():
            for _ in range(10):
                model(**wan_inputs)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(models, runs, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [run.layers for run in runs] == [[0, 1, 2, 3] * 10] * 2


def test_blocks_called_without_the_transformer_stay_dense(wan, make_run):
    run = make_run("zeros")
    install(wan.model, WAN, run)
    attention = wan.model.blocks[0].attn1
    x = torch.randn(1, 5, 24)
    with torch.no_grad():
        out = attention(x)
    assert run.declined == [(0, "called outside a forward call of the transformer")]
    assert out.abs().sum() > 0


def test_autocast(wan, make_run, wan_inputs):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = wan.model(**wan_inputs).sample
        run = make_run()
        install(wan.model, WAN, run)
        assert torch.equal(wan.model(**wan_inputs).sample, expected)
    assert run.calls


def test_failed_install_leaves_nothing(wan, make_run, monkeypatch, processors):
    from dit_accel_patches import layers

    before, keys, count = processors(wan.model), set(wan.model.__dict__), []

    def fail(processor, handle):
        count.append(1)
        if len(count) == 2:
            raise ZeroDivisionError
        return real(processor, handle)

    real = layers.wrap
    monkeypatch.setattr(layers, "wrap", fail)
    with pytest.raises(ZeroDivisionError):
        install(wan.model, WAN, make_run())
    assert same(processors(wan.model), before)
    assert set(wan.model.__dict__) == keys
    assert not wan.model._forward_pre_hooks
    assert not wan.model._forward_hooks


def test_gradients_go_dense_and_flow(wan, make_run, wan_inputs):
    run = make_run("zeros")
    install(wan.model, WAN, run)
    wan.model(**wan_inputs).sample.sum().backward()
    assert not run.calls
    assert {reason for _, reason in run.declined} == {"gradients are recorded"}
    assert wan.model.blocks[0].attn1.to_q.weight.grad is not None


def test_inference_mode(wan, make_run, wan_inputs):
    with torch.inference_mode():
        expected = wan.model(**wan_inputs).sample
        run = make_run()
        install(wan.model, WAN, run)
        assert torch.equal(wan.model(**wan_inputs).sample, expected)
    assert run.layers == [0, 1]


def test_compiled_module_is_unwrapped(wan, make_run):
    run = make_run()
    installation = install(torch.compile(wan.model, backend="eager"), WAN, run)
    wan()
    assert run.calls
    installation.undo()
    assert "_dit_accel" not in wan.model.__dict__


def test_image_to_video_has_its_image_keys_untouched(make_run, wan_inputs):
    """Cross-attention of I2V dispatches twice, once for the image; neither call is ours."""
    import diffusers

    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
        added_kv_proj_dim=24,
        image_dim=8,
    ).eval()
    inputs = {
        **wan_inputs,
        "encoder_hidden_states": torch.randn(1, 512, 32),
        "encoder_hidden_states_image": torch.randn(1, 7, 8),
    }
    run = make_run()
    with torch.no_grad():
        expected = model(**inputs).sample
        install(model, WAN, run)
        assert torch.equal(model(**inputs).sample, expected)
    assert run.layers == [0, 1]
    assert not run.declined
