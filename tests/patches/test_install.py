from __future__ import annotations

import copy
import inspect
import io
import pickle
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
    with pytest.raises(ValueError, match=r"no attention at layers\.\*\.attn"):
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


def test_state_dict_and_saved_files_are_clean(wan, make_run, tmp_path):
    keys = list(wan.model.state_dict())
    wan.model.save_pretrained(tmp_path / "before")
    install(wan.model, WAN, make_run())
    assert list(wan.model.state_dict()) == keys
    assert not [n for n, _ in wan.model.named_modules() if "dit_accel" in n]
    wan.model.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes()
    expected = wan()
    wan.pipe.save_pretrained(tmp_path / "pipe")
    loaded = type(wan.pipe).from_pretrained(tmp_path / "pipe", tokenizer=None, text_encoder=None)
    wan.pipe = loaded
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(wan(), expected)


def test_processor_pickles_and_copies_as_the_models_own(wan, make_run, processors):
    before = type(wan.model.blocks[0].attn1.processor)
    install(wan.model, WAN, make_run())
    processor = wan.model.blocks[0].attn1.processor
    assert isinstance(processor, before)
    for copied in (pickle.loads(pickle.dumps(processor)), copy.copy(processor), copy.deepcopy(processor)):
        assert type(copied) is before
        assert handle_of(copied) is None
        assert copied._attention_backend is None
    assert pickle.loads(pickle.dumps(type(processor))) is type(processor)


def test_deep_copy_is_dense_independent_and_says_so(wan, make_run, caplog, processors, wan_inputs):
    run = make_run("zeros")
    with torch.no_grad():
        expected = wan.model(**wan_inputs).sample
    install(wan.model, WAN, run)
    twin = copy.deepcopy(wan.model)
    assert not any(handle_of(p) for p in processors(twin).values())
    with torch.no_grad(), caplog.at_level("WARNING", logger="dit_accel"):
        assert torch.equal(twin(**wan_inputs).sample, expected)
        assert torch.equal(twin(**wan_inputs).sample, expected)
    assert len([r for r in caplog.records if "copy of an accelerated" in r.message]) == 1
    assert not run.calls
    assert "_dit_accel" not in twin.__dict__
    assert not twin._forward_pre_hooks
    second = make_run()
    install(twin, WAN, second)
    with torch.no_grad():
        twin(**wan_inputs)
    assert second.calls
    assert not run.calls


def test_deep_copy_can_be_accelerated_before_it_ran(wan, make_run, wan_inputs):
    install(wan.model, WAN, make_run())
    twin, run = copy.deepcopy(wan.model), make_run()
    install(twin, WAN, run).undo()
    assert "_dit_accel" not in twin.__dict__
    assert "_diffusers_hook" not in twin.__dict__


def test_whole_module_can_be_saved_with_torch(make_wan, make_run, wan_inputs):
    model = make_wan()
    with torch.no_grad():
        expected = model(**wan_inputs).sample
    install(model, WAN, make_run("zeros"))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    with torch.no_grad():
        assert torch.equal(torch.load(buffer, weights_only=False)(**wan_inputs).sample, expected)


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
