"""Inductor takes the operator's output for aligned, and it is."""

from __future__ import annotations

import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from dit_accel_patches import aligned, op


def test_every_output_is_aligned():
    base = torch.zeros(1 + 2 * 8 * 4)
    for offset in (0, 1):
        out = op._as_promised(base[offset : offset + 64].view(1, 2, 8, 4), base)
        assert out.data_ptr() % aligned.ALIGNMENT == 0
        assert out.is_contiguous()


def test_an_inductor_of_another_kind_is_left_alone(monkeypatch):
    operator = torch.ops.dit_accel.attend.default
    for strange in (SimpleNamespace(lowerings={}), SimpleNamespace(lowerings={}, tag_to_layout_constraint=None)):
        monkeypatch.setattr(aligned, "_told", set())
        monkeypatch.setitem(sys.modules, "torch._inductor.lowering", strange)
        aligned.tell_inductor(operator)
        assert strange.lowerings == {}


def test_what_others_have_said_stays(monkeypatch):
    operator = torch.ops.dit_accel.attend.default
    there = SimpleNamespace(lowerings={operator: "theirs"})
    monkeypatch.setattr(aligned, "_told", set())
    monkeypatch.setitem(sys.modules, "torch._inductor.lowering", there)
    aligned.tell_inductor(operator)
    assert there.lowerings == {operator: "theirs"}


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_code_counts_on_it(monkeypatch):
    from torch._inductor.utils import run_and_get_code

    def attend(handle, query, key, value, *rest):
        return query + key

    monkeypatch.setattr(op, "_dense_call", attend)
    layer = torch.tensor(1 << 40)

    def region(q, k, v, number):
        return torch.ops.dit_accel.attend(q * 1, k * 1, v * 1, number, None, None, False, False).flatten(2).sin()

    q = torch.randn(1, 8, 2, 4)
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        out, code = run_and_get_code(torch.compile(region, fullgraph=True), q, q, q, layer)
    torch._dynamo.reset()
    torch.testing.assert_close(out, (2 * q).flatten(2).sin())
    assert "dit_accel.attend" in code[0]
    assert "assumed to be not aligned" not in code[0]
