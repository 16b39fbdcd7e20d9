"""Weights and projections: LoRA, fused projections, quantised and stand-in linears, dtypes, casting."""

from __future__ import annotations

import contextlib
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_accel


def _lora(seed: int) -> dict[str, Tensor]:
    """Weights of a LoRA of rank 2 on the self-attention of the tiny Wan, as a file would have them."""
    gen = torch.Generator().manual_seed(seed)
    found = {}
    for block in range(2):
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            path = f"transformer.blocks.{block}.attn1.{part}"
            found[f"{path}.lora_A.weight"] = torch.randn(2, 32, generator=gen) / 4
            found[f"{path}.lora_B.weight"] = torch.randn(32, 2, generator=gen) / 4
    return found


def _load(tiny: Any, name: str, seed: int) -> None:
    tiny.pipe.load_lora_weights(_lora(seed), adapter_name=name)


LORA_STEPS = {
    "load": lambda t: _load(t, "a", 5),
    "load another": lambda t: _load(t, "b", 6),
    "one of them": lambda t: t.pipe.set_adapters(["a"], [0.5]),
    "both": lambda t: t.pipe.set_adapters(["a", "b"], [1.0, 0.3]),
    "off": lambda t: t.pipe.disable_lora(),
    "on": lambda t: t.pipe.enable_lora(),
    "fuse": lambda t: t.pipe.fuse_lora(components=["transformer"], adapter_names=["a", "b"]),
    "unfuse": lambda t: t.pipe.unfuse_lora(components=["transformer"]),
    "delete one": lambda t: t.pipe.delete_adapters("b"),
    "unload": lambda t: t.pipe.unload_lora_weights(),
}


@pytest.mark.combination(
    "Weights", "LoRA: load, several, `set_adapters`, fuse, unfuse, delete, unload", "works", "while enabled, too"
)
def test_lora_while_enabled(make: Any, ran_sparse: Any, sparse_of: Any) -> None:
    """Each step gives what a pipeline gives that had the same step before it was accelerated."""
    pytest.importorskip("peft")
    live, twin = make("wan"), make("wan")
    live.enable()
    seen: list[Tensor] = []
    for step in LORA_STEPS.values():
        step(live)
        step(twin)
        out = live()
        with twin.enabled() as handle:
            assert torch.equal(twin(), out)
            ran_sparse(handle)
        seen.append(out)
    before = [sparse_of("wan"), *seen[:-1]]
    changes = {step: float((b - a).norm() / a.norm()) for step, a, b in zip(LORA_STEPS, before, seen, strict=True)}
    assert all((change > 1e-3) == (step not in ("fuse", "unfuse")) for step, change in changes.items()), changes
    # Fusing and taking apart again rounds the weights.
    assert float((seen[-1] - sparse_of("wan")).norm() / seen[-1].norm()) < 1e-4
    dit_accel.disable(live.pipe)
    live.check_restored()


@pytest.mark.parametrize("family", ["wan", "flux", "cogvideox"])
@pytest.mark.combination(
    "Weights", "`fuse_qkv_projections` and `unfuse`", "works", "models that exchange their processors are wrapped again"
)
def test_fused_projections(
    make: Any, family: str, sparse_of: Any, dense_of: Any, ran_sparse: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = make(family)
    fused: Any = getattr(tiny.pipe, "fuse_qkv_projections", None) or tiny.model.fuse_qkv_projections
    unfused: Any = getattr(tiny.pipe, "unfuse_qkv_projections", None) or tiny.model.unfuse_qkv_projections
    with caplog.at_level(logging.WARNING, logger="dit_accel"):
        handle = tiny.enable()
        fused()
        torch.testing.assert_close(tiny(), sparse_of(family), rtol=1e-3, atol=1e-3)
        ran_sparse(handle, at_least=0.6)
        unfused()
        torch.testing.assert_close(tiny(), sparse_of(family), rtol=1e-3, atol=1e-3)
        ran_sparse(handle, at_least=0.6)
        handle.disable()
    assert torch.equal(tiny(), dense_of(family))
    assert len(caplog.records) <= 2  # each kind of exchange is said once
    fused()
    with tiny.enabled() if family != "cogvideox" else contextlib.nullcontext(tiny.enable()) as handle:
        torch.testing.assert_close(tiny(), sparse_of(family), rtol=1e-3, atol=1e-3)
        ran_sparse(handle, at_least=0.6)


class HalfByte(nn.Linear):
    """As bitsandbytes keeps weights: packed integers in `weight`, numbers made of them in `forward`."""

    @torch.no_grad()
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.bias = linear.bias
        top = linear.weight.abs().amax()
        packed = ((linear.weight / top * 7).round() + 8).to(torch.uint8)
        self.scale = float(top / 7)
        self.weight = nn.Parameter(packed[:, ::2] * 16 + packed[:, 1::2], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        high, low = (self.weight // 16).to(x.dtype) - 8, (self.weight % 16).to(x.dtype) - 8
        weight = torch.stack((high, low), -1).flatten(1) * self.scale
        return nn.functional.linear(x, weight, self.bias)


def _swap_linears(model: nn.Module) -> None:
    for block in model.blocks:
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, name, HalfByte(child))


@pytest.mark.combination(
    "Weights", "linears of bitsandbytes' kind (packed integer weights)", "works", "tested with a stand-in class"
)
@pytest.mark.parametrize("before", [True, False], ids=["before enabling", "while enabled"])
def test_packed_linears(wan: Any, dense_of: Any, ran_sparse: Any, before: bool) -> None:
    if before:
        _swap_linears(wan.model)
        handle = wan.enable()
    else:
        handle = wan.enable()
        _swap_linears(wan.model)
    assert wan.model.blocks[0].attn1.to_q.weight.dtype == torch.uint8
    sparse = wan()
    ran_sparse(handle)
    wan.enable(density=1.0)
    full = wan()
    dit_accel.disable(wan.pipe)
    wan.check_restored()
    dense = wan()
    torch.testing.assert_close(full, dense, rtol=1e-4, atol=1e-4)
    assert not torch.equal(sparse, dense)
    assert not torch.equal(dense, dense_of("wan"))


def _torchao(kind: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    return getattr(quantization, kind)()


@pytest.mark.combination("Weights", "torchao int8 and fp8 weights (`quantize_`)", "works", "before or while enabled")
@pytest.mark.parametrize(
    "kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]
)
def test_torchao(wan: Any, ran_sparse: Any, kind: str) -> None:
    config = _torchao(kind)
    from torchao.quantization import quantize_

    handle = wan.enable()
    plain = wan()
    quantize_(wan.model, config, filter_fn=lambda m, path: isinstance(m, nn.Linear) and "blocks" in path)
    assert "torchao" in type(wan.model.blocks[0].attn1.to_q.weight.data).__module__
    sparse = wan()
    ran_sparse(handle)
    assert not torch.equal(sparse, plain)
    assert float((sparse - plain).norm() / plain.norm()) < 0.2
    handle.disable()
    dense = wan()
    with wan.enabled(density=1.0):
        # Rounded activations turn a last bit into a step.
        assert float((wan() - dense).norm() / dense.norm()) < 5e-3
    with wan.enabled():
        assert torch.equal(wan(), sparse)
    assert torch.equal(wan(), dense)


@pytest.mark.combination("Weights", "layerwise casting", "works", "storage in fp8 or half precision")
@pytest.mark.parametrize("storage", [torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("before", [True, False], ids=["before enabling", "while enabled"])
def test_layerwise_casting(wan: Any, dense_of: Any, ran_sparse: Any, storage: torch.dtype, before: bool) -> None:
    def cast() -> None:
        wan.model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)

    if before:
        cast()
        handle = wan.enable()
    else:
        handle = wan.enable()
        cast()
    sparse = wan()
    assert wan.model.blocks[0].attn1.to_q.weight.dtype == storage
    ran_sparse(handle)
    wan.enable(density=1.0)
    full = wan()
    dit_accel.disable(wan.pipe)
    dense = wan()
    wan.check_restored()
    torch.testing.assert_close(full, dense, rtol=1e-4, atol=1e-4)
    assert not torch.equal(sparse, dense)
    assert not torch.equal(dense, dense_of("wan"))


@pytest.mark.combination("Weights", "fp16, bf16, fp32", "works", "changed while enabled, too")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["wan", "flux", "cogvideox"])
def test_dtypes(make: Any, ran_sparse: Any, family: str, dtype: torch.dtype) -> None:
    tiny = make(family)
    handle = tiny.enable()
    tiny.pipe.transformer.to(dtype)
    for name, value in tiny.call.items():
        if isinstance(value, Tensor):
            tiny.call[name] = value.to(dtype)
    sparse = tiny()
    ran_sparse(handle, at_least=0.6)
    handle.disable()
    dense = tiny()
    assert torch.isfinite(sparse).all()
    assert not torch.equal(sparse, dense)
    with tiny.enabled(density=1.0):
        full = tiny()
    rounding = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert float((full - dense).float().norm() / dense.float().norm()) < rounding
    assert torch.equal(tiny(), dense)


@pytest.mark.combination("Weights", "`torch.autocast`", "works")
def test_autocast(wan: Any, ran_sparse: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        dense = wan()
        with wan.enabled() as handle:
            sparse = wan()
            ran_sparse(handle)
        with wan.enabled(density=1.0):
            full = wan()
        assert torch.equal(wan(), dense)
    assert not torch.equal(sparse, dense)
    assert float((full - dense).float().norm() / dense.float().norm()) < 3e-2


@pytest.mark.combination(
    "Weights", "IP-Adapter (processors with weights)", "stays dense", "those layers alone, with the reason"
)
def test_ip_adapter(flux: Any) -> None:
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    adapter = FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=32, num_tokens=(4,))
    flux.model.transformer_blocks[0].attn.set_processor(adapter)
    flux.call["joint_attention_kwargs"] = {"ip_hidden_states": [torch.zeros(1, 4, 32)]}
    handle = flux.enable()
    flux()
    status = handle.stats()["transformer"]
    handle.disable()
    assert status.layers[0].sparse == 0
    assert "module with weights of its own" in next(iter(status.layers[0].dense))
    assert status.layers[1].sparse == 3
    assert flux.model.transformer_blocks[0].attn.processor is adapter


@pytest.mark.combination("Weights", "gradients", "stays dense", "and they flow")
def test_gradients(wan: Any) -> None:
    inputs = (torch.randn(1, 4, 5, 16, 16), torch.tensor([500.0]), wan.call["prompt_embeds"])
    expected = wan.model(*inputs, return_dict=False)[0]
    with wan.enabled(wan.model, warmup=0.0, score="mean_pool") as handle:
        out = wan.model(*inputs, return_dict=False)[0]
        assert handle.stats()["transformer"].reasons == {"gradients are recorded": 2}
        with torch.no_grad():
            wan.model(*inputs)
        assert handle.stats()["transformer"].sparse_calls == 2
    assert torch.equal(out, expected)
    out.sum().backward()
    assert wan.model.blocks[0].attn1.to_q.weight.grad.abs().sum() > 0


@pytest.mark.combination("Weights", "gradient checkpointing, on or off, under `no_grad`", "works")
def test_gradient_checkpointing(wan: Any, sparse_of: Any, ran_sparse: Any) -> None:
    handle = wan.enable()
    wan.model.enable_gradient_checkpointing()
    assert torch.equal(wan(), sparse_of("wan"))
    ran_sparse(handle)
    wan.model.train()  # only then the blocks are checkpointed
    assert torch.equal(wan(), sparse_of("wan"))
    ran_sparse(handle)
    wan.model.eval()
    wan.model.disable_gradient_checkpointing()
    assert torch.equal(wan(), sparse_of("wan"))
    handle.disable()
    wan.check_restored()


@pytest.mark.combination(
    "Weights", "training with gradient checkpointing while enabled", "stays dense", "same gradients"
)
def test_checkpointed_gradients(wan: Any) -> None:
    inputs = (torch.randn(1, 4, 5, 16, 16), torch.tensor([500.0]), wan.call["prompt_embeds"])
    wan.model.enable_gradient_checkpointing()
    wan.model.train()

    def gradient() -> Tensor:
        wan.model.zero_grad()
        wan.model(*inputs, return_dict=False)[0].square().sum().backward()
        return wan.model.blocks[0].attn1.to_q.weight.grad.clone()

    expected = gradient()
    with wan.enabled(wan.model, warmup=0.0, score="mean_pool") as handle:
        assert torch.equal(gradient(), expected)
        assert handle.stats()["transformer"].sparse_calls == 0
    assert float(expected.abs().sum()) > 0


@pytest.mark.combination("Copies and files", "a LoRA saved and loaded again", "works")
def test_lora_file(wan: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    with wan.enabled():
        torch.manual_seed(5)
        config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        wan.model.add_adapter(config)
        expected = wan()
        wan.model.save_lora_adapter(tmp_path)
        wan.model.delete_adapters("default")
        assert not torch.equal(wan(), expected)
        wan.model.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix=None)
        assert torch.equal(wan(), expected)
