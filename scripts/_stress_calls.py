"""One random call of a kernel, and what it should give in float64, with every mask spelled out."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dit_accel_kernels import attention_lse, block_mass
from dit_accel_kernels.backends import run_backend
from dit_accel_kernels.lists import gathered_from_mask, lists_from_levels, pack_bits
from dit_accel_kernels.types import BlockLists, GatheredKeys, Pooled, TokenOrder, TokenWindows

__all__ = ["VARIANTS", "Pending", "Variant", "run_call", "start_call"]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Relative to the norm of the reference: weights and output are rounded once each.
TOLERANCE = {BF16: 8e-3, FP16: 2e-3, FP32: 1e-4}
LSE_TOLERANCE = {BF16: 2e-3, FP16: 2e-3, FP32: 1e-4}


@dataclass(frozen=True)
class Variant:
    """What is fixed when a kernel is compiled."""

    dim: int
    block_q: int = 128
    block_k: int = 128
    dtype: torch.dtype = BF16
    even: bool = False
    pooled: bool = False
    order: bool = False
    valid: bool = False
    windows: bool = False
    far: bool = False  # codes too far apart for the bits of ``near.py``
    group: int = 0
    sample: int | None = None


VARIANTS: dict[str, list[Variant]] = {
    "hopper": [
        Variant(128, even=True),
        Variant(128),
        Variant(128, pooled=True),
        Variant(128, pooled=True, order=True),
        Variant(128, order=True),
        Variant(128, valid=True),
        Variant(128, block_k=64, pooled=True),
        Variant(128, block_k=64, pooled=True, order=True),
        Variant(128, block_k=64, valid=True, order=True),
        Variant(64, block_k=64, pooled=True),
        Variant(64, valid=True, order=True),
        Variant(64, dtype=FP16, pooled=True),
        Variant(96, order=True),
        Variant(72, block_k=64, dtype=FP16, pooled=True, valid=True),
        Variant(128, windows=True),
        Variant(128, block_k=64, windows=True, order=True),
        Variant(64, block_k=64, windows=True, valid=True),
    ],
    "triton": [
        Variant(128, 64, 64, pooled=True, order=True),
        Variant(128, windows=True, far=True),
        Variant(64, 64, 64, group=8),
        Variant(128, 128, 64, FP16, valid=True),
        Variant(96, 64, 64, pooled=True),
        Variant(64, 64, 128, FP32, order=True),
        Variant(64, 64, 64, FP16, windows=True, pooled=True, order=True, valid=True),
        Variant(128, 64, 64, group=1, pooled=True, order=True),
    ],
    "mass_hopper": [
        Variant(128, even=True),
        Variant(128, 64, 64),
        Variant(64, 64, 64, FP16, valid=True),
        Variant(96, order=True, sample=16),
        Variant(128, 64, 64, order=True, sample=32),
    ],
    "mass_triton": [Variant(128, 64, 64, order=True), Variant(64, valid=True, sample=16)],
    "dense_hopper": [Variant(128), Variant(64, valid=True)],
    "cpu": [
        Variant(64, 64, 64, FP32, pooled=True, order=True),
        Variant(32, 32, 64, FP32, windows=True, valid=True),
        Variant(40, 64, 32, FP32, group=4, order=True),
    ],
}


@dataclass
class Call:
    """Inputs of a call, and its mask of blocks ``levels [B|1, H|1, Qb, Kb]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    levels: Tensor
    lists: BlockLists
    scale: float
    wild: bool
    order: TokenOrder | None = None
    pooled: Pooled | None = None
    windows: TokenWindows | None = None
    key_valid: Tensor | None = None
    gathered: GatheredKeys | None = None
    mask: Tensor | None = None


def draw(variant: Variant, seed: int, device: torch.device) -> Call:
    """A random call; the same for the same seed on the same kind of device."""
    rng, gen = random.Random(seed), torch.Generator(device).manual_seed(seed)
    batch, heads = rng.randint(1, 2), rng.randint(1, 3)
    sq = rng.choice([1, 63, 128, rng.randint(1, 700), rng.randint(1, 700)])
    sk = rng.randint(1, 6) * variant.block_k if variant.even else rng.randint(1, 700)
    layout = rng.choice(["BHSD", "BSHD", "fused", "padded"])

    def view(tokens: int) -> Tensor:
        shape = (batch, tokens, heads, variant.dim)
        if layout == "BHSD":
            return torch.randn(batch, heads, *shape[1:2], variant.dim, generator=gen, device=device).to(variant.dtype)
        if layout == "fused":  # one of three in a projection's output
            x = torch.randn(batch, tokens, 3, heads, variant.dim, generator=gen, device=device).to(variant.dtype)
            return x[:, :, 1].transpose(1, 2)
        if layout == "padded":  # a head wider than what is used
            x = torch.randn(batch, tokens, heads, variant.dim + 16, generator=gen, device=device).to(variant.dtype)
            return x[..., : variant.dim].transpose(1, 2)
        return torch.randn(shape, generator=gen, device=device).to(variant.dtype).transpose(1, 2)

    q, k, v = view(sq), view(sk), view(sk)
    wild = rng.random() < 0.2
    if wild:  # some keys outweigh all others by far, most often not those of the first tile
        factor = 60.0 if variant.dtype == BF16 else 8.0
        loud = torch.rand(1, 1, sk, 1, generator=gen, device=device) < rng.choice([0.02, 0.5])
        k = torch.where(loud, k * factor, k)
    qb, kb = -(-sq // variant.block_q), -(-sk // variant.block_k)
    shape = (rng.choice([1, batch]), rng.choice([1, heads]), qb, kb)
    density = rng.choice([0.0, 0.1, 0.3, 0.6, 1.0])
    levels = (torch.rand(shape, generator=gen, device=device) < density).to(torch.uint8)
    if variant.windows or rng.random() < 0.5:
        half = torch.rand(shape, generator=gen, device=device) < 0.5
        levels = torch.where(half & (levels != 0), 255, levels).to(torch.uint8)
    lists = lists_from_levels(levels, variant.block_q, variant.block_k)
    call = Call(q, k, v, levels, lists, rng.choice([variant.dim**-0.5, 0.05, 0.3]), wild)
    if wild:
        call.scale = variant.dim**-0.5
    _extras(call, variant, rng, gen)
    if variant.group == 0 and not variant.valid and rng.random() < 0.4:  # what no query sees may hold anything
        unseen = (
            (levels.expand(batch, heads, -1, -1) == 0).all(2).repeat_interleave(variant.block_k, -1)[..., :sk, None]
        )
        call.k, call.v = k.masked_fill(unseen, torch.nan), v.masked_fill(unseen, torch.nan)
    return call


def _extras(call: Call, variant: Variant, rng: random.Random, gen: torch.Generator) -> None:
    """Order, remainder, windows, padding and gathered keys, as far as the variant has them."""
    (batch, heads, sq, dim), sk, device = call.q.shape, call.k.shape[2], call.q.device
    kb = call.levels.shape[3]

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=gen, device=device, dtype=torch.int32)

    if variant.order:
        table = torch.rand(3, sq, generator=gen, device=device).argsort(-1).int()
        call.order = TokenOrder(table, integers(0, 3, heads))
    if variant.pooled:
        means = [torch.randn(batch, heads, kb, dim, generator=gen, device=device).to(call.q.dtype) for _ in "kv"]
        bias = torch.randn(batch, 1, kb, generator=gen, device=device) + 3
        bias[..., kb // 2] = -torch.inf
        call.pooled = Pooled(*means, bias, pack_bits(call.levels))
    if variant.windows:
        step = 9 if variant.far else 1
        code = integers(-1, rng.choice([8, 3]), 3, sk) * step
        call.windows = TokenWindows(integers(-1, 2, 3, sq) * step, integers(2, 9, 3, sq) * step, code)
    if variant.valid:
        call.key_valid = torch.rand(batch, sk, generator=gen, device=device) < 0.8
        if rng.random() < 0.5:
            call.key_valid[:, sk // 2 : sk // 2 + 150] = False  # some blocks hold nothing
    if variant.group:
        extra = rng.randint(1, 90)
        shape = (*call.levels.shape[:3], -(-extra // variant.group))
        call.mask = torch.rand(shape, generator=gen, device=device) < 0.4
        bias = torch.randn(batch, 1, extra, generator=gen, device=device)
        bias[..., :: variant.group + 3] = -torch.inf
        more = [torch.randn(batch, heads, extra, dim, generator=gen, device=device).to(call.q.dtype) for _ in "kv"]
        call.gathered = GatheredKeys(*more, bias, *gathered_from_mask(call.mask), variant.group)


def _places(call: Call) -> Tensor:
    """int64 ``[H, Sq]``: position in block order of each query."""
    if call.order is None:
        return torch.arange(call.q.shape[2], device=call.q.device).expand(call.q.shape[1], -1)
    return call.order.table[call.order.head.long()].long().argsort(-1)


def expected(call: Call) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64."""
    batch, heads = call.q.shape[:2]
    sk, place = call.k.shape[2], _places(call)
    rows = (place // call.lists.block_q)[None, :, :, None].expand(batch, -1, -1, -1)
    levels = call.levels.expand(batch, heads, -1, -1)
    row_levels = levels.gather(2, rows.expand(-1, -1, -1, levels.shape[3]))
    level = row_levels.repeat_interleave(call.lists.block_k, -1)[..., :sk]
    seen = level != 0
    if call.windows is not None:
        lo, hi, code = call.windows.q_lo[:, place], call.windows.q_hi[:, place], call.windows.k_code
        inside = ((lo[..., None] <= code[:, None, None]) & (code[:, None, None] < hi[..., None])).all(0) | (code[0] < 0)
        seen = (level == 1) | ((level == 255) & inside)
    if call.key_valid is not None:
        seen = seen & call.key_valid[:, None, None]
    q, k = call.q.double(), call.k.double().nan_to_num(0.0)
    logits = [(q @ k.mT * call.scale).masked_fill(~seen, -torch.inf)]
    values = [call.v.double().nan_to_num(0.0)]
    if call.pooled is not None:
        more = q @ call.pooled.k.double().mT * call.scale + call.pooled.bias.double()[:, :, None]
        logits.append(more.masked_fill(row_levels != 0, -torch.inf))
        values.append(call.pooled.v.double())
    if call.gathered is not None and call.mask is not None:
        g = call.gathered
        more = q @ g.k.double().mT * call.scale + g.bias.double()[:, :, None]
        mask = call.mask.expand(batch, heads, -1, -1)
        sees = mask.gather(2, rows.expand(-1, -1, -1, mask.shape[3])).repeat_interleave(g.group, -1)
        logits.append(more.masked_fill(~sees[..., : more.shape[3]], -torch.inf))
        values.append(g.v.double())
    every = torch.cat(logits, -1)
    return every.softmax(-1).nan_to_num(0.0) @ torch.cat(values, 2), every.logsumexp(-1)


@dataclass(frozen=True)
class Pending:
    """A call under way: numbers on the device, and what they mean once they have been read."""

    numbers: Tensor
    judge: Callable[[list[float]], str | None]


def run_call(kernel: str, variant: Variant, seed: int, device: torch.device, *, twice: bool) -> str | None:
    """Make a call and say what is wrong with it, or return ``None``."""
    pending = start_call(kernel, variant, seed, device, twice=twice)
    return pending.judge(pending.numbers.tolist())


def start_call(kernel: str, variant: Variant, seed: int, device: torch.device, *, twice: bool) -> Pending:
    """Make a call and everything it is compared with, and wait for nothing: reading back takes longer than a call."""
    call = draw(variant, seed, device)
    if kernel.startswith("mass"):
        return _start_mass(kernel, call, variant, twice)
    extras: dict[str, Any] = {
        name: getattr(call, name) for name in ("order", "pooled", "windows", "key_valid", "gathered")
    }
    if kernel == "dense_hopper":
        call = replace(call, k=call.k.nan_to_num(0.0), v=call.v.nan_to_num(0.0), order=None)
        call.levels = torch.ones_like(call.levels)

    def run() -> tuple[Tensor, Tensor]:
        if kernel == "dense_hopper":
            from dit_accel_kernels.dense import _with_lse

            return _with_lse("hopper", call.q, call.k, call.v, call.scale, call.key_valid)
        return run_backend(kernel, call.q, call.k, call.v, call.lists, scale=call.scale, return_lse=True, **extras)

    out, lse = run()
    again, lse_again = run() if twice else (out, lse)
    return _compared(call, out, lse, again, lse_again)


def _compared(call: Call, out: Tensor, lse: Tensor, again: Tensor, lse_again: Tensor) -> Pending:
    dtype = call.q.dtype
    if out.stride() != torch.empty_like(call.q).stride():
        return Pending(torch.zeros(0), lambda _: f"strides {out.stride()}")
    want, want_lse = expected(call)
    empty = want_lse == -torch.inf
    numbers = (
        # NaN differs from itself: what holds it counts as another run's.
        (out != again).any() | (lse != lse_again).any(),
        ((lse == -torch.inf) != empty).any(),
        (out.masked_fill(~empty[..., None], 0) != 0).any(),
        (out.double() - want).norm() / want.norm().clamp_min(1e-6),
        (out.double() - want).abs().max(),
        want.abs().max(),
        (lse.double() - want_lse).masked_fill(empty, 0).abs().max(),
    )

    def judge(found: list[float]) -> str | None:
        differ, rows, nonzero, error, worst, largest, off = found
        if rows:
            return "other rows are empty"
        if nonzero:
            return "rows without keys are not 0"
        if not (error <= TOLERANCE[dtype] and worst <= 10 * TOLERANCE[dtype] * max(1.0, largest)):
            return f"relative error {error:.3g}, largest {worst:.3g}"
        if not off <= LSE_TOLERANCE[dtype] * (10 if call.wild else 1):
            return f"log-sum-exp differs by {off:.3g}"
        return "two runs differ" if differ else None

    return Pending(torch.stack([x.double() for x in numbers]), judge)


def _start_mass(kernel: str, call: Call, variant: Variant, twice: bool) -> Pending:
    """The same for the block mass."""
    q, k = call.q, call.k.nan_to_num(0.0)
    lse = attention_lse(q, k, scale=call.scale, key_valid=call.key_valid, backend="reference")
    options: dict[str, Any] = {
        "block_q": variant.block_q,
        "block_k": variant.block_k,
        "scale": call.scale,
        "order": call.order,
        "sample": variant.sample,
    }
    logits = q.double() @ k.double().mT * call.scale - lse.double()[..., None]
    p = logits.exp()
    if call.key_valid is not None:
        p = p * call.key_valid[:, None, None]
        k = k.masked_fill(~call.key_valid[:, None, :, None], torch.nan)
        p = torch.where(lse.isfinite()[..., None], p, 0.0)
    (batch, heads, sq, _), sk = q.shape, k.shape[2]
    kb, qb = -(-sk // variant.block_k), -(-sq // variant.block_q)
    per_key = torch.nn.functional.pad(p, (0, kb * variant.block_k - sk)).view(batch, heads, sq, kb, -1).sum(-1)
    place = _places(call)
    step = variant.block_q // (variant.sample or variant.block_q)
    counted = (place % step == 0) & lse.isfinite()
    row = (place // variant.block_q)[None, :, :, None].expand(batch, -1, -1, kb)
    total = per_key.new_zeros(batch, heads, qb, kb).scatter_add_(2, row, per_key * counted[..., None])
    count = per_key.new_zeros(batch, heads, qb).scatter_add_(2, row[..., 0], counted.double())
    want = total / count.clamp(min=1)[..., None]

    def run() -> Tensor:
        return block_mass(q, k, lse, key_valid=call.key_valid, backend=kernel.removeprefix("mass_"), **options)

    got = run()
    again = run() if twice else got
    numbers = torch.stack([(got != again).any().double(), (got.double() - want).abs().max()])

    def judge(found: list[float]) -> str | None:
        if not found[1] <= (2e-2 if call.wild else 2e-4):
            return f"mass differs by {found[1]:.3g}"
        return "two runs differ" if found[0] else None

    return Pending(numbers, judge)
