"""Offload and placement: what accelerate's and diffusers' hooks do while attention is accelerated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel_patches.install import Installation

CPU = torch.device("cpu")


def _held(tiny: Any) -> list[Tensor]:
    """The tensors that an acceleration holds between two runs."""
    found = tiny.model.__dict__["_dit_accel"]
    assert isinstance(found, Installation)
    return [state.plan for state in found.run._states.values() if state.plan is not None]


@pytest.mark.combination("Placement", "`enable_model_cpu_offload`", "works", "before or while enabled; on the CPU")
@pytest.mark.parametrize("before", [True, False], ids=["before enabling", "while enabled"])
def test_model_offload(wan: Any, sparse_of: Any, dense_of: Any, ran_sparse: Any, before: bool) -> None:
    pytest.importorskip("accelerate")
    if before:
        wan.pipe.enable_model_cpu_offload(device="cpu")
    handle = wan.enable()
    if not before:
        wan.pipe.enable_model_cpu_offload(device="cpu")
    assert hasattr(wan.model, "_hf_hook")
    for _ in range(2):  # the end of a run removes the hooks and puts them back
        assert torch.equal(wan(), sparse_of("wan"))
        ran_sparse(handle)
        assert not _held(wan)  # what is offloaded leaves no plans behind on the device
    handle.disable()
    assert hasattr(wan.model, "_hf_hook")
    assert torch.equal(wan(), dense_of("wan"))
    wan.pipe.remove_all_hooks()
    wan.check_restored()


@pytest.mark.combination(
    "Placement", "`enable_sequential_cpu_offload`", "works", "weights on meta between the calls; on the CPU"
)
@pytest.mark.parametrize("before", [True, False], ids=["before enabling", "while enabled"])
def test_sequential_offload(wan: Any, sparse_of: Any, dense_of: Any, ran_sparse: Any, before: bool) -> None:
    accelerate = pytest.importorskip("accelerate")

    def offload() -> None:
        """As the pipeline's own, which wants an accelerator: each leaf gets its weights for the time of its call."""
        weights = {name: value.detach().clone() for name, value in wan.model.state_dict().items()}
        accelerate.cpu_offload(wan.model, CPU, state_dict=weights)
        accelerate.hooks.add_hook_to_module(wan.pipe.vae, accelerate.hooks.AlignDevicesHook(CPU))

    if before:
        offload()
    handle = wan.enable()
    if not before:
        offload()
    assert wan.model.blocks[0].attn1.to_q.weight.is_meta
    for _ in range(2):
        assert torch.equal(wan(), sparse_of("wan"))
        ran_sparse(handle)
    handle.disable()
    assert torch.equal(wan(), dense_of("wan"))
    wan.check_restored()


@pytest.mark.combination("Placement", "`device_map` with a block on disk", "works")
def test_device_map(wan: Any, sparse_of: Any, dense_of: Any, ran_sparse: Any, tmp_path: Path) -> None:
    """One block waits on disk; with one kind of device here, this is as far as a map goes on the CPU."""
    accelerate = pytest.importorskip("accelerate")
    names = [name for name, _ in wan.model.named_children() if name != "blocks"]
    rest = [name for name, _ in wan.model.named_parameters(recurse=False)]
    places = {**dict.fromkeys([*names, *rest, "blocks.0"], "cpu"), "blocks.1": "disk"}
    accelerate.dispatch_model(wan.model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert wan.model.blocks[1].attn1.to_q.weight.is_meta
    with wan.enabled() as handle:
        assert torch.equal(wan(), sparse_of("wan"))
        ran_sparse(handle)
    assert torch.equal(wan(), dense_of("wan"))


@pytest.mark.combination("Placement", "a pipeline loaded with `device_map`", "works")
def test_from_pretrained_with_device_map(wan: Any, sparse_of: Any, ran_sparse: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    wan.model.save_pretrained(tmp_path)
    wan.pipe.transformer = type(wan.model).from_pretrained(tmp_path, device_map={"": "cpu"})
    wan.processors = wan._processors()
    with wan.enabled() as handle:
        assert torch.equal(wan(), sparse_of("wan"))
        ran_sparse(handle)


@pytest.mark.combination(
    "Placement", "`enable_group_offload`, by block or by leaf", "works", "before or while enabled; on the CPU"
)
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("before", [True, False], ids=["before enabling", "while enabled"])
def test_group_offload(
    wan: Any, sparse_of: Any, dense_of: Any, ran_sparse: Any, group_offload: Any, kind: str, before: bool
) -> None:
    if before:
        group_offload(wan.model, kind)
    handle = wan.enable()
    if not before:
        group_offload(wan.model, kind)
    for _ in range(2):
        assert torch.equal(wan(), sparse_of("wan"))
        ran_sparse(handle)
    handle.disable()
    assert torch.equal(wan(), dense_of("wan"))
    wan.check_restored()


@pytest.mark.gpu
@pytest.mark.combination(
    "Placement", "offload between CPU and GPU", "works", "model, sequential, by group with a stream; run on an H200"
)
@pytest.mark.parametrize("kind", ["model", "sequential", "group", "to"])
def test_offload_from_a_gpu(wan: Any, ran_sparse: Any, kind: str) -> None:
    wan.pipe.to(torch.float32)
    device = torch.device("cuda")
    # Wan's pipeline does not move embeddings, and its timestep follows them.
    wan.call = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in wan.call.items()}
    with wan.enabled() as handle:
        wan.pipe.to(device)
        expected = wan().cpu()
        wan.pipe.to("cpu")
        if kind == "model":
            wan.pipe.enable_model_cpu_offload()
        elif kind == "sequential":
            wan.pipe.enable_sequential_cpu_offload()
        elif kind == "group":
            wan.pipe.vae.to(device)
            wan.model.enable_group_offload(
                onload_device=device, offload_device=CPU, offload_type="leaf_level", use_stream=True
            )
        else:
            wan.pipe.to(device)
        for _ in range(2):
            torch.testing.assert_close(wan().cpu(), expected, rtol=1e-4, atol=1e-4)
            ran_sparse(handle)
        if kind in ("model", "sequential"):
            wan.pipe.remove_all_hooks()


@pytest.mark.combination("Placement", "moved between two runs (`pipe.to`)", "works")
def test_moved_between_runs(wan: Any, sparse_of: Any, ran_sparse: Any) -> None:
    """To another dtype and back, as nothing of ours may stay behind in the old one."""
    with wan.enabled() as handle:
        first = wan()
        wan.pipe.transformer.to(torch.float64)
        double = wan(prompt_embeds=wan.call["prompt_embeds"].double())
        ran_sparse(handle)
        assert float((double - first).norm() / first.norm()) < 1e-3
        wan.pipe.transformer.to(torch.float32)
        assert torch.equal(wan(), sparse_of("wan"))


@pytest.mark.combination("Attention backends", "`set_attention_backend` before", "works", "it computes the dense calls")
def test_backend_before(wan: Any, dense_of: Any, ran_sparse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _spy(monkeypatch, "_native_math")
    wan.model.set_attention_backend("_native_math")
    dense = wan()
    calls.clear()
    with wan.enabled() as handle:
        wan()
        status = ran_sparse(handle)
    cross = 4 * 2 * 2
    assert len(calls) == cross  # the planning step takes the log-sum-exp from a kernel that has one
    with wan.enabled(warmup=0.5):
        calls.clear()
        wan()
        assert len(calls) == cross + 1 * 2 * 2  # and another dense step is the user's
    assert status.reasons == {"planning step": 4}
    assert torch.equal(wan(), dense)


@pytest.mark.combination(
    "Attention backends", "`set_attention_backend` while enabled", "works", "said once; sparse calls stay"
)
def test_backend_while_enabled(
    wan: Any, sparse_of: Any, ran_sparse: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = _spy(monkeypatch, "_native_math")
    handle = wan.enable(warmup=0.5)
    wan.model.set_attention_backend("_native_math")
    with caplog.at_level("WARNING", logger="dit_accel"):
        wan()
        wan()
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("dit_accel")]
    assert ["_native_math" in message for message in ours] == [True]
    ran_sparse(handle, at_least=0.5)
    assert len(calls) == 2 * (4 * 2 * 2 + 1 * 2 * 2)
    handle.disable()
    wan.check_restored()
    # The choice stays when we are gone.
    assert wan.model.blocks[0].attn1.processor._attention_backend.value == "_native_math"
    wan.model.reset_attention_backend()
    with wan.enabled():
        torch.testing.assert_close(wan(), sparse_of("wan"), rtol=1e-3, atol=1e-3)


@pytest.mark.combination("Attention backends", "`with attention_backend(...)`", "works", "it computes the dense calls")
def test_backend_context(wan: Any, sparse_of: Any, ran_sparse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.attention_dispatch import attention_backend

    calls = _spy(monkeypatch, "_native_math")
    with wan.enabled() as handle:
        with attention_backend("_native_math"):
            out = wan()
            ran_sparse(handle)
        assert len(calls) == 4 * 2 * 2
        torch.testing.assert_close(out, sparse_of("wan"), rtol=1e-3, atol=1e-3)
        assert torch.equal(wan(), sparse_of("wan"))


@pytest.mark.combination(
    "Attention backends", "a backend that is a sparse one itself (flex masks)", "stays dense", "with the reason"
)
def test_flex_masks_stay_dense(wan: Any) -> None:
    """As Kandinsky 5 with its own sparse attention does it."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(lambda b, h, q, k: k < 160, None, None, 320, 320, device="cpu")
    attention = wan.model.blocks[0].attn1

    class Masked(type(attention.processor)):  # type: ignore[misc]
        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            q, k, v = (x(hidden_states).unflatten(2, (attn.heads, -1)) for x in (attn.to_q, attn.to_k, attn.to_v))
            out = dispatch_attention_fn(q, k, v, attn_mask=mask, backend=self._attention_backend)
            return attn.to_out[0](out.flatten(2))

    attention.set_processor(Masked())
    attention.processor._attention_backend = "flex"
    wan.processors = wan._processors()
    expected = wan()
    with wan.enabled() as handle:
        assert not torch.equal(wan(), expected)
        status = handle.stats()["transformer"]
    assert status.layers[0].dense == {"attention mask of type BlockMask": 8}
    assert status.layers[1].sparse == 6
    assert torch.equal(wan(), expected)


def _spy(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    from diffusers.models import attention_dispatch as dispatch

    member = dispatch.AttentionBackendName(name)
    original, calls = dispatch._AttentionBackendRegistry._backends[member], []

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setitem(dispatch._AttentionBackendRegistry._backends, member, spy)
    return calls
