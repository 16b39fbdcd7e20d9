"""What :mod:`hopper8` times: 8-bit, 16-bit and dense attention on the same tensors, the quantiser, and peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from _hopper_inputs import SHAPES, make, to_lists
from _turns import CUDNN, dense, graphed
from torch import Tensor
from torch.nn import functional as F

from dit_accel_kernels import permute_tokens
from dit_accel_kernels.quantize import PRECISIONS, QuantizedQKV, quantize_qkv
from dit_accel_kernels.quantized.hopper8_specs import Hopper8Config, hopper8_config
from dit_accel_kernels.types import BlockLists, TokenOrder

__all__ = ["Calls", "Problem", "case_calls", "peers", "quantiser_calls", "run", "variants"]

Calls = dict[str, tuple[Callable[[], Any], float]]


def variants(precision: str, dim: int) -> dict[str, Hopper8Config]:
    """The configurations to compare, the default first."""
    base = hopper8_config(dim, PRECISIONS[precision].pv)
    if PRECISIONS[precision].pv == "bf16":
        return {"default": base, "one stage less": replace(base, stages=base.stages - 1)}
    return {
        "default": base,
        "no turns": replace(base, turns=False),
        "no lines": replace(base, lines=False),
    }


def run(q: Tensor, made: QuantizedQKV, lists: BlockLists, **kwargs: Any) -> tuple[Tensor, Tensor]:
    from dit_accel_kernels.quantized.hopper8_launch import quantized_hopper

    return quantized_hopper(q, made, lists, scale=q.shape[-1] ** -0.5, **kwargs)


@dataclass(frozen=True)
class Problem:
    """Inputs of a case: tensors ``[1, H, S, D]``, lists of blocks, the order of the keys, and the work of the lists."""

    q: Tensor
    k: Tensor
    v: Tensor
    lists: BlockLists
    order: TokenOrder
    work: float

    @classmethod
    def of(cls, shape: str, density: float, uneven: bool) -> Problem:
        heads, tokens, dim = SHAPES[shape]
        q, k, v, levels = make(heads, tokens, dim, density, uneven)
        table = torch.stack([torch.randperm(tokens, device="cuda") for _ in range(2)]).int()
        order = TokenOrder(table, (torch.arange(heads, device="cuda") % 2).int())
        return cls(q, k, v, to_lists(levels), order, 4.0 * 128 * 128 * dim * int(levels.sum()))

    def eight(self, precision: str) -> None:
        """Quantise and attend."""
        run(self.q, quantize_qkv(self.q, self.k, self.v, precision, block_k=128), self.lists, return_lse=False)

    def whole_eight(self, precision: str) -> None:
        """The same from keys and values in natural order."""
        moved: dict[str, Any] = {"order": self.order, "keys_ordered": False}
        made = quantize_qkv(self.q, self.k, self.v, precision, block_k=128, **moved)
        run(self.q, made, self.lists, order=self.order, return_lse=False)

    def whole_sixteen(self) -> None:
        """Move keys and values and attend."""
        k, v = permute_tokens(self.k, self.order), permute_tokens(self.v, self.order)
        sixteen(self.q, k, v, self.lists, order=self.order)


def sixteen(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, **kwargs: Any) -> None:
    from dit_accel_kernels.block_sparse.hopper_launch import block_sparse_hopper

    block_sparse_hopper(q, k, v, lists, scale=q.shape[-1] ** -0.5, return_lse=False, **kwargs)


def case_calls(p: Problem, precisions: list[str], failed: set[tuple[str, int]], every: bool, cudnn: bool) -> Calls:
    """What is timed in a case; with ``every`` all variants and the Triton kernel too."""
    from dit_accel_kernels.quantized.launch import quantized_triton

    _, heads, tokens, dim = p.q.shape
    calls: Calls = {CUDNN: (partial(dense, p.q, p.k, p.v), 4.0 * heads * tokens * tokens * dim)} if cudnn else {}
    calls["hopper 16 bit"] = (partial(sixteen, p.q, p.k, p.v, p.lists), p.work)
    calls["hopper 16 bit, whole"] = (p.whole_sixteen, p.work)
    for precision in precisions:
        made = quantize_qkv(p.q, p.k, p.v, precision, block_k=128)
        if every:
            call = partial(quantized_triton, p.q, made, p.lists, scale=dim**-0.5, return_lse=False)
            calls[f"{precision} triton"] = (call, p.work)
        if (precision, dim) in failed:
            continue
        for name, config in variants(precision, dim).items():
            if name == "default" or every:
                call = partial(run, p.q, made, p.lists, config=config, return_lse=False)
                calls[f"{precision} hopper {name}"] = (call, p.work)
        calls[f"{precision} hopper + quantise"] = (partial(p.eight, precision), p.work)
        calls[f"{precision} hopper, whole"] = (partial(p.whole_eight, precision), p.work)
    return calls


def peers(p: Problem) -> tuple[Calls, dict[str, str]]:
    """Dense 8-bit attention of others, and why each that is absent is."""

    def sage() -> Callable[[], Any]:
        from sageattention import sageattn  # type: ignore[import-not-found]

        own = p.k.clone()  # it takes the mean off its argument
        return partial(sageattn, p.q, own, p.v)

    def comfy() -> Callable[[], Any]:
        import comfy_kitchen  # type: ignore[import-not-found]

        return partial(comfy_kitchen.int8_attention, *(x.contiguous() for x in (p.q, p.k, p.v)))

    want = F.scaled_dot_product_attention(p.q[:, :, :256], p.k, p.v).float()
    calls: Calls = {}
    said = {}
    for name, load in (("SageAttention 1.0.6", sage), ("comfy-kitchen int8_attention", comfy)):
        try:
            call = load()
            got = call()[:, :, :256].float()
            said[name] = f"relative error {((got - want).norm() / want.norm()).item():.1e}"
            calls[name] = (call, p.work)
        except Exception as error:  # whatever a peer throws is the reason why it is not in the table
            said[name] = f"absent: {type(error).__name__} {str(error)[:200]}"
    return calls, said


def quantiser_calls(p: Problem, precisions: list[str]) -> Calls:
    """The quantiser alone, four calls a CUDA graph; the "work" is bytes: all tensors read once and written once."""
    calls: Calls = {}
    size = float(p.q.numel() * 3)
    for precision in precisions:
        given: dict[str, Any] = {"block_k": 128}
        for label, options, wide in (
            ("", given, 2.0),
            (", moved", {"order": p.order, "keys_ordered": False, **given}, 10 / 3),
        ):
            each = 4 * size * (3 if PRECISIONS[precision].pv == "fp8" else wide)
            call = partial(quantize_qkv, p.q, p.k, p.v, precision, **options)
            calls[f"{precision}: quantise{label}"] = (graphed(call, 4), each)

    def move() -> None:
        permute_tokens(p.k, p.order)
        permute_tokens(p.v, p.order)

    calls["16 bit: move keys and values"] = (graphed(move, 4), 4 * size * 8 / 3)
    return calls
