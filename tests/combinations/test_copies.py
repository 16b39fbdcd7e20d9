"""Copies and files of accelerated things."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import dit_accel


@pytest.mark.combination(
    "Copies and files", "`copy.deepcopy`", "works", "the copy is dense, says so once, and can be enabled"
)
@pytest.mark.parametrize("what", ["pipe", "model"])
def test_deepcopy(
    wan: Any, dense_of: Any, sparse_of: Any, ran_sparse: Any, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    handle = wan.enable()
    wan()
    twin = copy.deepcopy(wan.pipe)
    if what == "model":
        twin.transformer = copy.deepcopy(wan.model)
    with caplog.at_level("WARNING", logger="dit_accel"):
        assert torch.equal(wan(twin), dense_of("wan"))
        assert torch.equal(wan(twin), dense_of("wan"))
    assert ["runs dense; enable dit_accel on the copy" in r.getMessage() for r in caplog.records] == [True]
    assert dit_accel.status(twin) == {}
    assert torch.equal(wan(), sparse_of("wan"))
    with dit_accel.enable(twin, handle.method, min_tokens=0) as second:
        handle.disable()  # of the original, nothing to the copy
        assert torch.equal(wan(twin), sparse_of("wan"))
        ran_sparse(second)
    assert torch.equal(wan(), dense_of("wan"))
    wan.check_restored()


@pytest.mark.combination(
    "Copies and files", "`pickle`, `torch.save` of a transformer", "works", "what is loaded is dense"
)
@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_pickle(wan: Any, dense_of: Any, sparse_of: Any, how: str) -> None:
    handle = wan.enable()
    wan()
    if how == "pickle":
        loaded = pickle.loads(pickle.dumps(wan.model))
    else:
        file = io.BytesIO()
        torch.save(wan.model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    assert torch.equal(wan(), sparse_of("wan"))
    handle.disable()
    wan.pipe.transformer = loaded
    assert torch.equal(wan(), dense_of("wan"))
    with dit_accel.enable(wan.pipe, handle.method, min_tokens=0):
        assert torch.equal(wan(), sparse_of("wan"))
    assert torch.equal(wan(), dense_of("wan"))


@pytest.mark.combination(
    "Copies and files", "`save_pretrained`, `from_pretrained`", "works", "files are the same bytes"
)
def test_saved_pipeline(wan: Any, dense_of: Any, sparse_of: Any, ran_sparse: Any, tmp_path: Path) -> None:
    wan.pipe.save_pretrained(tmp_path / "before")
    keys = list(wan.model.state_dict())
    with wan.enabled() as handle:
        wan()
        wan.pipe.save_pretrained(tmp_path / "after")
        assert list(wan.model.state_dict()) == keys
        files = [path.relative_to(tmp_path / "before") for path in (tmp_path / "before").rglob("*") if path.is_file()]
        assert len(files) > 4
        for path in files:
            assert (tmp_path / "before" / path).read_bytes() == (tmp_path / "after" / path).read_bytes()
        loaded = type(wan.pipe).from_pretrained(tmp_path / "after", tokenizer=None, text_encoder=None)
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(wan(loaded), dense_of("wan"))
        with dit_accel.enable(loaded, handle.method, min_tokens=0) as second:
            assert torch.equal(wan(loaded), sparse_of("wan"))
            ran_sparse(second)


@pytest.mark.combination("Copies and files", "`load_state_dict` while enabled", "works")
def test_load_state_dict(make: Any, sparse_of: Any) -> None:
    tiny = make("wan")
    weights = copy.deepcopy(tiny.model.state_dict())
    with tiny.enabled():
        with torch.no_grad():
            for parameter in tiny.model.parameters():
                parameter.mul_(0.9)
        assert not torch.equal(tiny(), sparse_of("wan"))
        tiny.model.load_state_dict(weights)
        assert torch.equal(tiny(), sparse_of("wan"))


@pytest.mark.combination(
    "Copies and files", "a transformer put into the pipeline after `enable`", "stays dense", "enable again"
)
def test_exchanged_transformer(make: Any, dense_of: Any, sparse_of: Any) -> None:
    tiny, other = make("wan"), make("wan")
    first = tiny.enable()
    tiny.pipe.transformer = other.model
    assert torch.equal(tiny(), dense_of("wan"))
    assert dit_accel.status(tiny.pipe) == {}
    second = tiny.enable()
    assert torch.equal(tiny(), sparse_of("wan"))
    first.disable()
    second.disable()
    assert torch.equal(tiny(), dense_of("wan"))
