from __future__ import annotations

import copy
import io
import pickle

import torch

from dit_accel_patches.install import install
from dit_accel_patches.processor import handle_of
from dit_accel_patches.wan import ADAPTER as WAN


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
