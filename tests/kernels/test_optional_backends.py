"""FlexAttention against the oracle on a CPU; flash-attn-4, NATTEN and xFormers by their reasons and by stand-ins."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel_kernels import block_sparse_attention, dense, lists_from_levels
from dit_accel_kernels.backends import BACKENDS, choose_backend, require_backend, self_test, why_not
from dit_accel_kernels.block_sparse import flash4, natten, xformers
from dit_accel_kernels.block_sparse.flash4 import block_sparse_flash4, flash4_lists
from dit_accel_kernels.block_sparse.flex import block_sparse_flex, flex_lists
from dit_accel_kernels.block_sparse.reference import block_sparse_reference
from tests.kernels.problems import Case, check, make

SITE: dict[str, Any] = {"dtype": torch.bfloat16, "head_dim": 128, "block_q": 128, "block_k": 128}
CASES = [
    Case("plain", sk=128),
    Case("ragged", sq=70, sk=150),
    Case("shared lists, two batch elements", batch=2, list_shape=(1, 1), sk=200),
    Case("lists of each batch element", batch=2, list_shape=(2, 2), sk=130, pooled=True),
    Case("empty rows", density=0.0),
    Case("order", order=True),
    Case("pooled and order", pooled=True, order=True),
    Case("windows", windows=True, density=0.8),
    Case("windows, pooled and order", windows=True, pooled=True, order=True, block_k=32),
    Case("padding", valid=True, batch=2),
    Case("gathered", group=4, batch=2, list_shape=(1, 2)),
    Case("all", group=8, pooled=True, order=True, windows=True, valid=True, dim=40, block_q=32),
    Case("bfloat16", dtype=torch.bfloat16, pooled=True, order=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_flex_equals_the_oracle(case: Case) -> None:
    p = make(case, "cpu")
    check(p, *block_sparse_flex(p.q, p.k, p.v, p.lists, scale=case.dim**-0.5, **p.extras()))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[1], CASES[6], CASES[8]], ids=str)
def test_compiled_flex_equals_the_oracle(case: Case) -> None:
    p = make(replace(case, dtype=torch.bfloat16, block_k=64), "cuda")
    check(p, *block_sparse_flex(p.q, p.k, p.v, p.lists, scale=case.dim**-0.5, **p.extras()))


def test_flex_lists_hold_the_blocks_of_the_mask() -> None:
    levels = torch.tensor([[0, 1, 255, 1], [0, 0, 0, 0], [1, 1, 1, 255]], dtype=torch.uint8)[None, None]
    some, some_ids, whole, whole_ids = flex_lists(levels, ragged=3)
    assert some.tolist() == [[[2, 0, 1]]]
    assert whole.tolist() == [[[1, 0, 3]]]
    assert some_ids[0, 0, 0, :2].tolist() == [2, 3]
    assert whole_ids[0, 0, 2, :3].tolist() == [0, 1, 2]
    assert sorted(some_ids[0, 0, 1].tolist()) == [0, 1, 2, 3]
    assert flex_lists(levels, all_partial=True)[2].sum() == 0


def test_flex_is_served_when_asked_for_and_never_chosen() -> None:
    site = {"dtype": torch.float32, "head_dim": 32, "block_q": 32, "block_k": 32}
    assert self_test("flex", "cpu", **site) is None
    assert choose_backend(device="cpu", **site)[0] == "cpu"
    q, k, v = (torch.randn(1, 90, 2, 32).transpose(1, 2) for _ in range(3))
    lists = lists_from_levels((torch.rand(1, 2, 3, 3) < 0.5).to(torch.uint8), 32, 32)
    got = block_sparse_attention(q, k, v, lists, backend="flex", return_lse=True)
    want = block_sparse_attention(q, k, v, lists, backend="reference", return_lse=True)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"backend='flex' cannot be used: block_k must be a multiple of 16, got 24"):
        require_backend("flex", device=torch.device("cpu"), **{**site, "block_k": 24})
    assert "dtype must be" in str(why_not("flex", device="cpu", **{**site, "dtype": torch.float64}))


@pytest.mark.parametrize("name", ["flash4", "natten", "xformers"])
def test_what_is_not_there_has_a_reason(name: str) -> None:
    package = {"flash4": "flash_attn"}.get(name, name)
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    natten._load.cache_clear()
    reason = why_not(name, device="cuda", **SITE)
    assert "is not installed" in str(reason)
    with pytest.raises(ValueError, match=f"backend='{name}' cannot be used: .* is not installed"):
        require_backend(name, device=torch.device("cuda"), **SITE)
    assert BACKENDS[name].devices == ()


def test_flash4_names_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash4, "_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert "must be an NVIDIA GPU, got cpu" in str(why_not("flash4", device="cpu", **SITE))
    assert why_not("flash4", device="cuda", **SITE) is None
    for change, message in (
        ({"head_dim": 72}, "head_dim must be 64, 96 or 128, got 72"),
        ({"dtype": torch.float32}, "dtype must be bfloat16 or float16"),
        ({"block_q": 64}, "block_q must be 128, got 64"),
    ):
        assert message in str(why_not("flash4", device="cuda", **{**SITE, **change}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert "compute capability must be 9.x or 10.x, got 8.0" in str(why_not("flash4", device="cuda", **SITE))


def fake_flash4(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Modules in place of flash-attn-4 that compute what its lists say, with rubbish in rows without a block."""
    calls: list[Any] = []

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, block_sparse_tensors: Any, return_lse: bool
    ) -> Any:
        sparse = block_sparse_tensors
        calls.append(sparse)
        assert not sparse.mask_block_cnt.any()
        assert sparse.block_size == (128, 128)
        kb = k.shape[1] // 128
        seen = torch.arange(kb) < sparse.full_block_cnt[..., None]
        mask = torch.zeros(*seen.shape[:3], kb, dtype=torch.bool)
        mask.scatter_(3, sparse.full_block_idx.long().masked_fill(~seen, 0), seen)
        # Entry 0 may have been unset by a slot behind the end.
        mask[..., 0] = ((sparse.full_block_idx == 0) & seen).any(-1)
        tokens = mask.repeat_interleave(128, 2).repeat_interleave(128, 3)
        logits = (q.transpose(1, 2) @ k.transpose(1, 2).mT * softmax_scale).masked_fill(~tokens, -torch.inf)
        out = (logits.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)
        return out, logits.logsumexp(-1).nan_to_num(neginf=7.0), None, None, None

    def tensors(cnt: Tensor, idx: Tensor, full: Tensor, full_idx: Tensor, *, block_size: tuple[int, int]) -> Any:
        return types.SimpleNamespace(
            mask_block_cnt=cnt, full_block_cnt=full, full_block_idx=full_idx, block_size=block_size
        )

    modules = {
        "flash_attn.cute.interface": types.SimpleNamespace(_flash_attn_fwd=attend),
        "flash_attn.cute.block_sparsity": types.SimpleNamespace(BlockSparseTensorsTorch=tensors),
    }
    real = importlib.import_module
    monkeypatch.setattr(
        flash4.importlib, "import_module", lambda name, *a: modules[name] if name in modules else real(name, *a)
    )

    def portable(*args: Any, return_lse: bool = True, **given: Any) -> tuple[Tensor, Tensor]:
        calls.append("triton")
        return block_sparse_reference(*args, **given)

    launch = types.ModuleType("dit_accel_kernels.block_sparse.launch")
    launch.block_sparse_triton = portable  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dit_accel_kernels.block_sparse.launch", launch)
    return calls


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        (Case("blocks", sq=256, sk=384, block_q=128, block_k=128), 1),
        (Case("no block", sq=256, sk=256, block_q=128, block_k=128, density=0.2, seed=4), 1),
        (Case("order", sq=256, sk=384, block_q=128, block_k=128, order=True, batch=2, list_shape=(1, 1)), 1),
        (Case("pooled", sq=256, sk=384, block_q=128, block_k=128, pooled=True, order=True), 2),
    ],
    ids=str,
)
def test_flash4_gets_our_lists_and_the_rest_is_joined(case: Case, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_flash4(monkeypatch)
    p = make(case, "cpu")
    check(p, *block_sparse_flash4(p.q, p.k, p.v, p.lists, scale=case.dim**-0.5, **p.extras()))
    assert len(calls) == parts
    assert calls[0] != "triton"


@pytest.mark.parametrize(
    "case",
    [
        Case("ragged", sq=256, sk=300, block_q=128, block_k=128),
        Case("windows", sq=256, sk=256, block_q=128, block_k=128, windows=True),
        Case("padding", sq=256, sk=256, block_q=128, block_k=128, valid=True),
    ],
    ids=str,
)
def test_flash4_leaves_the_rest_to_triton(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_flash4(monkeypatch)
    p = make(case, "cpu")
    check(p, *block_sparse_flash4(p.q, p.k, p.v, p.lists, scale=case.dim**-0.5, **p.extras()))
    assert calls == ["triton"]


def test_flash4_lists_stay_below_the_number_of_blocks() -> None:
    levels = torch.tensor([[0, 1, 1], [1, 0, 0]], dtype=torch.uint8)[None, None]
    count, ids = flash4_lists(lists_from_levels(levels, 128, 128, capacity=3), 3)
    assert count.tolist() == [[[2, 1]]]
    assert ids[0, 0, 0, :2].tolist() == [1, 2]
    assert ids[0, 0, 1, 0] == 0
    assert 0 <= int(ids.min()) <= int(ids.max()) < 3


def test_natten_says_why_and_gets_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 2, 24, 16)
    monkeypatch.setattr(natten, "_load", lambda: (None, "natten has no compiled library for torch 2.11"))
    assert "no compiled library" in str(why_not("natten", device="cuda", **SITE))
    with pytest.raises(ValueError, match="natten cannot be used: natten has no compiled library"):
        natten.natten_windows(q, q, q, (2, 3, 4), (1, 3, 3))
    monkeypatch.setattr(natten, "_load", lambda: (object(), None))
    assert "not lists of blocks" in str(why_not("natten", device="cuda", **SITE))
    assert "must be an NVIDIA GPU" in str(natten.why_not_natten_windows(q, (2, 3, 4)))
    monkeypatch.setattr(natten, "why_not_natten_windows", lambda *_: None)
    seen: dict[str, Any] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        seen.update(given, shape=tuple(q.shape))
        return v, q[..., 0]

    module = types.SimpleNamespace(neighborhood_attention_generic=attend)
    monkeypatch.setattr(natten.importlib, "import_module", lambda _: module)
    out, lse = natten.natten_windows(q, q, q, (2, 3, 4), (1, 3, 3), stride=(1, 3, 1))
    assert torch.equal(out, q)
    assert torch.equal(lse, q[..., 0])
    assert seen["shape"] == (1, 2, 3, 4, 2, 16)
    assert (seen["kernel_size"], seen["stride"], seen["dilation"]) == ((1, 3, 3), (1, 3, 1), (1, 1, 1))
    assert seen["is_causal"] == (False,) * 3
    assert seen["scale"] == 0.25


def test_the_grid_must_have_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(natten, "_load", lambda: (object(), None))
    q = types.SimpleNamespace(is_cuda=True, device="cuda", dtype=torch.float16, shape=(1, 2, 24, 16))
    assert natten.why_not_natten_windows(q, (2, 3, 4)) is None  # type: ignore[arg-type]
    assert "one to three axes and 24 tokens, got (2, 3, 5)" in str(natten.why_not_natten_windows(q, (2, 3, 5)))  # type: ignore[arg-type]


def test_xformers_serves_dense_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    fmha = types.SimpleNamespace(
        Inputs=lambda *x: x,
        cutlass=types.SimpleNamespace(FwOp=types.SimpleNamespace(not_supported_reasons=lambda _: ["too old a GPU"])),
        memory_efficient_attention_partial=lambda q, k, v, scale, op: (v * scale, torch.zeros(1, 2, 32)),
    )
    ops = types.ModuleType("xformers.ops")
    ops.fmha = fmha  # type: ignore[attr-defined]
    package = types.ModuleType("xformers")
    package.ops = ops  # type: ignore[attr-defined]
    for name, module in (("xformers", package), ("xformers.ops", ops)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(xformers.importlib.util, "find_spec", lambda _: object())
    assert "no attention over lists of blocks" in str(xformers.why_not_xformers())
    q = torch.randn(1, 2, 20, 8)
    assert "device must be cuda" in str(xformers.why_not_dense_xformers(q, q, q))
    on_gpu = types.SimpleNamespace(is_cuda=True, transpose=lambda *_: None)
    assert xformers.why_not_dense_xformers(on_gpu, on_gpu, on_gpu) == "too old a GPU"  # type: ignore[arg-type]
    out, lse = dense._with_lse("xformers", q, q, q, 0.5, None)
    assert torch.equal(out, q * 0.5)
    assert lse.shape == (1, 2, 20)
