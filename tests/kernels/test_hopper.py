"""The Hopper kernel against the masked reference, on a GPU of compute capability 9.0.

A wrong barrier does not fail, it hangs. So each group of cases runs in a process of its own under a hard time limit,
the simplest first. ``PYTHONPATH=.:kernels python tests/kernels/test_hopper.py`` runs all groups up to the first failure.
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import dataclass, replace

import pytest
import torch

from dit_accel_kernels.block_sparse.hopper_launch import (
    block_sparse_hopper,
    reroute_reason,
    run_hopper,
    why_not_hopper,
)
from dit_accel_kernels.block_sparse.hopper_specs import hopper_config
from dit_accel_kernels.block_sparse.reference import block_sparse_reference
from dit_accel_kernels.lists import lists_from_levels, pack_bits
from dit_accel_kernels.types import Pooled, TokenOrder, TokenWindows
from tests.kernels.groups import run_in_a_process

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
# Relative to the norm of the reference, in float32 on the same inputs: weights and output are rounded once each.
TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1e-3}
LSE_TOLERANCE = 2e-3  # of natural-logarithm logits up to about 10; the products are exact, the sum is float32


@dataclass(frozen=True)
class Case:
    sq: int = 128
    sk: int = 128
    dim: int = 128
    block_k: int = 128
    batch: int = 1
    heads: int = 1
    dtype: torch.dtype = torch.bfloat16
    density: float = 1.0
    list_shape: tuple[int, int] = (1, 1)
    bshd: bool = True
    partial: bool = False
    pooled: bool = False
    order: bool = False
    poison: bool = False
    programs: int | None = None
    valid: bool = False
    windows: bool = False
    wild: bool = False
    fast: bool | None = None
    lse: bool = True
    stages: int | None = None
    short: float = 0.0  # rows of up to so many tiles go to the kernel for short lists
    seed: int = 0


def run_case(case: Case) -> None:
    gen = torch.Generator().manual_seed(case.seed)
    device = torch.device("cuda")

    def draw(tokens: int, bshd: bool) -> torch.Tensor:
        shape = (case.batch, tokens, case.heads) if bshd else (case.batch, case.heads, tokens)
        x = torch.randn(*shape, case.dim, generator=gen).to(device, case.dtype)
        return x.transpose(1, 2) if bshd else x

    q, k, v = (draw(tokens, case.bshd) for tokens in (case.sq, case.sk, case.sk))
    if case.wild:  # all blocks but the last, which is visited first, have logits that overflow relative to its maximum
        k = torch.cat([k[:, :, : -case.block_k] * 60, k[:, :, -case.block_k :]], 2)
    qb, kb = -(-case.sq // 128), -(-case.sk // case.block_k)
    levels = (torch.rand(*case.list_shape, qb, kb, generator=gen) < case.density).to(torch.uint8)
    if case.partial:
        levels = torch.where((torch.rand(levels.shape, generator=gen) < 0.5) & (levels != 0), 255, levels).byte()
    lists = lists_from_levels(levels.to(device), 128, case.block_k)
    if not case.partial:
        lists = replace(lists, partial=None)
    pooled = order = None
    if case.pooled:
        bias = torch.randn(case.batch, 1, kb, generator=gen) + 3
        bias[..., kb // 2] = -torch.inf
        pooled = Pooled(draw(kb, False), draw(kb, False), bias.to(device), pack_bits(levels).to(device))
    if case.order:
        table = torch.stack([torch.randperm(case.sq, generator=gen) for _ in range(3)]).int().to(device)
        order = TokenOrder(table, torch.randint(0, 3, (case.heads,), generator=gen).int().to(device))
    if case.poison:
        unseen = (levels.expand(case.batch, case.heads, -1, -1) == 0).all(2)  # [B, H, Kb]
        unseen = unseen.repeat_interleave(case.block_k, -1)[..., : case.sk, None].to(device)
        k, v = k.masked_fill(unseen, torch.nan), v.masked_fill(unseen, torch.nan)
    config = hopper_config(case.dim)
    wishes = {name: getattr(case, name) for name in ("stages", "fast")}
    wishes = {name: x for name, x in wishes.items() if x is not None}
    config = replace(config, max_programs=case.programs, short_tiles=case.short, **wishes)
    valid = None
    if case.valid:
        valid = torch.rand(case.batch, case.sk, generator=gen) < 0.8
        valid[:, case.sk // 2 : case.sk // 2 + 150] = False  # some blocks hold nothing
        valid = valid.to(device)
    windows = draw_windows(case, gen).to(device) if case.windows else None
    seen_by = None if windows is None else TokenWindows(*windows.split([case.sq, case.sq, case.sk], 1))
    call = {"scale": case.dim**-0.5, "order": order, "pooled": pooled, "key_valid": valid, "windows": seen_by}
    out, lse = block_sparse_hopper(q, k, v, lists, config=config, **call)
    again, _ = block_sparse_hopper(q, k, v, lists, config=config, **call)
    if not case.lse:
        again, nothing = block_sparse_hopper(q, k, v, lists, config=config, return_lse=False, **call)
        assert nothing.numel() == 0
    torch.cuda.synchronize()
    floats = [x.float() for x in (q, k, v)]
    if pooled is not None:
        call["pooled"] = replace(pooled, k=pooled.k.float(), v=pooled.v.float())
    want, want_lse = block_sparse_reference(*floats, lists, **call)
    assert out.stride() == torch.empty_like(q).stride(), f"{case}: strides {out.stride()}"
    assert torch.equal(out, again), f"{case}: two runs differ by {(out.float() - again.float()).abs().max().item()}"
    error = ((out.float() - want).norm() / want.norm().clamp_min(1e-6)).item()
    worst = (out.float() - want).abs().max().item()
    assert error <= TOLERANCE[case.dtype], f"{case}: relative error {error:.3g}, largest {worst:.3g}"
    empty = want_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty), f"{case}: empty rows differ"
    off = (lse - want_lse).masked_fill(empty, 0).abs().max().item()
    assert off <= LSE_TOLERANCE * (10 if case.wild else 1), f"{case}: log-sum-exp differs by {off:.3g}"
    assert not out[empty].any(), f"{case}: rows without keys must be 0"


def draw_windows(case: Case, gen: torch.Generator) -> torch.Tensor:
    """Bounds of the queries and codes of the keys, side by side; codes of blocks start anywhere, some are free."""
    blocks = -(-case.sk // case.block_k)
    start = torch.randint(0, 40, (3, blocks), generator=gen).repeat_interleave(case.block_k, 1)[:, : case.sk]
    code = start + torch.randint(0, 10, (3, case.sk), generator=gen)
    code[:, torch.rand(case.sk, generator=gen) < 0.1] = -1
    low = torch.randint(-2, 25, (3, case.sq), generator=gen)
    return torch.cat([low, low + torch.randint(0, 40, (3, case.sq), generator=gen), code], 1).int()


def random_cases(dim: int, block_k: int) -> list[Case]:
    """70 shapes on few compiled variants: all ragged, with partial blocks."""
    rng = random.Random(dim + block_k)
    cases = []
    for seed in range(70):
        batch, heads = rng.randint(1, 2), rng.randint(1, 3)
        valid = block_k == 64 and rng.random() < 0.3
        windows = dim == 128 and rng.random() < 0.3
        cases.append(
            Case(
                sq=rng.randint(1, 900),
                sk=rng.choice([128, 256, 640]) * 2 + rng.randint(1, 63) if rng.random() < 0.7 else rng.randint(1, 63),
                dim=dim,
                block_k=block_k,
                batch=batch,
                heads=heads,
                density=rng.choice([0.0, 0.1, 0.5, 1.0]),
                list_shape=(rng.choice([1, batch]), rng.choice([1, heads])),
                bshd=rng.random() < 0.5,
                partial=True,
                valid=valid,
                pooled=not valid and not windows and rng.random() < 0.5,
                order=block_k == 128 and rng.random() < 0.3,
                poison=not valid and rng.random() < 0.5,
                windows=windows,
                wild=rng.random() < 0.2,
                programs=rng.choice([1, 2, 5, None]),
                seed=seed,
            )
        )
    return cases


LONG = Case(sq=1024, sk=1024, heads=3, batch=2, density=0.4, list_shape=(2, 3))
GROUPS: dict[str, list[Case]] = {
    "one tile": [Case()],
    "two tiles": [Case(sk=256)],
    "three and more tiles": [Case(sk=384), Case(sk=512), Case(sk=1024)],
    "many heads": [Case(sq=512, sk=512, heads=3, batch=2), replace(LONG, density=1.0), LONG],
    "jobs in turn": [replace(LONG, programs=n) for n in (7, 2, 1)] + [replace(LONG, heads=60, list_shape=(1, 60))],
    "empty rows": [replace(LONG, density=0.0), replace(LONG, density=0.1, poison=True, programs=4)],
    "ragged": [
        Case(sq=130, sk=200),
        Case(sq=1, sk=1),
        replace(LONG, sq=900, sk=1000, programs=5),
        replace(LONG, sq=1100, sk=333, poison=True),
    ],
    "partial": [replace(LONG, partial=True), replace(LONG, sk=1000, partial=True, poison=True, programs=3)],
    "layouts": [replace(LONG, bshd=False), replace(LONG, list_shape=(1, 1)), replace(LONG, list_shape=(2, 1))],
    "pooled": [
        Case(pooled=True, density=0.0),
        replace(LONG, pooled=True),
        replace(LONG, pooled=True, sk=128 * 300, sq=300, density=0.1, programs=4),
        replace(LONG, pooled=True, density=0.0, programs=3),
    ],
    "pooled, ragged": [replace(LONG, pooled=True, sk=1000, poison=True), replace(LONG, pooled=True, sk=50, programs=3)],
    "float16": [replace(LONG, dtype=torch.float16), replace(LONG, dtype=torch.float16, pooled=True)],
    "head size 64": [
        replace(LONG, dim=64),
        replace(LONG, dim=64, sk=1000, programs=3),
        replace(LONG, dim=64, pooled=True, sk=1000),
        replace(LONG, dim=64, dtype=torch.float16),
    ],
    "key blocks of 64": [
        Case(block_k=64, sk=64),
        Case(block_k=64, sk=192),
        replace(LONG, block_k=64),
        replace(LONG, block_k=64, dim=64),
        replace(LONG, block_k=64, sk=1000, programs=3, poison=True),
        replace(LONG, block_k=64, sk=1000, programs=3, pooled=True, partial=True),
    ],
    "key_valid": [
        replace(LONG, valid=True),
        replace(LONG, valid=True, block_k=64, sk=1000, programs=3),
        replace(LONG, valid=True, block_k=64, sk=1000, pooled=True, partial=True),
    ],
    "windows": [
        replace(LONG, partial=True, windows=True),
        replace(LONG, partial=True, windows=True, sk=1000, programs=3, poison=True),
        replace(LONG, partial=True, windows=True, sk=1000, sq=900, block_k=64, order=True),
        replace(LONG, partial=True, windows=True, sk=130, block_k=64, density=0.8, wild=True),
        replace(LONG, partial=True, windows=True, dim=64, valid=True, sk=1000),
        replace(LONG, partial=True, windows=True, dim=96, block_k=64, dtype=torch.float16, programs=4),
    ],
    "wild logits": [
        Case(sk=512, wild=True),
        replace(LONG, wild=True, density=1.0),
        replace(LONG, wild=True, programs=1),
        replace(LONG, wild=True, programs=5, pooled=True, sk=1000, block_k=64, dim=64),
        replace(LONG, wild=True, valid=True, programs=7),
        replace(LONG, wild=True, order=True, heads=40, list_shape=(1, 1)),
    ],
    "padded head sizes": [replace(LONG, dim=dim, block_k=64, sk=1000) for dim in (40, 72, 80, 96)]
    + [replace(LONG, dim=96, order=True, pooled=True), replace(LONG, dim=72, bshd=False)],
    "order": [replace(LONG, order=True), replace(LONG, order=True, sq=1000, sk=1000, programs=3)],
    "order, pooled": [replace(LONG, order=True, pooled=True, dim=dim, sk=1000) for dim in (128, 64)],
    "no log-sum-exp": [replace(LONG, lse=False, programs=3)],
    "other rings": [
        replace(LONG, stages=2),
        replace(LONG, stages=2, programs=3, pooled=True),
        replace(LONG, stages=1, programs=3),
    ],
    **{f"random, {d} by {k}": random_cases(d, k) for d, k in ((128, 128), (128, 64), (64, 64))},
}
LIMIT_S = {"pooled": 60.0, "head size 64": 90.0, "padded head sizes": 90.0, "windows": 150.0}
LIMIT_S |= {name: 240.0 for name in GROUPS if name.startswith("random")}


def run_group(name: str, scale: float = 1.0) -> tuple[bool, str]:
    """Run a group in a fresh process; whether it passed, and the end of what it said."""
    return run_in_a_process(__file__, "--group", name, limit=LIMIT_S.get(name, 45.0) * scale)


@pytest.mark.gpu
@pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("name", GROUPS)
def test_equals_the_reference(name: str) -> None:
    passed, said = run_group(name)
    assert passed, said


def test_reasons_why_not() -> None:
    asked = {"dtype": torch.bfloat16, "head_dim": 128, "block_q": 128, "block_k": 128}
    assert "must be an NVIDIA GPU, got cpu" in (why_not_hopper(device=torch.device("cpu"), **asked) or "")


def test_rerouted_calls_have_a_reason() -> None:
    q = torch.randn(1, 2, 256, 64).bfloat16()
    lists = lists_from_levels(torch.ones(1, 1, 2, 2, dtype=torch.uint8), 128, 128)
    assert reroute_reason(q, q, q, lists) is None
    codes = torch.arange(3 * 256, dtype=torch.int32).view(3, 256) // 32
    windows = TokenWindows(codes, codes, codes)
    assert reroute_reason(q, q, q, lists, windows=windows) is None
    far = replace(windows, k_code=codes * 4)
    assert "within ten" in (reroute_reason(q, q, q, lists, windows=far) or "")
    wide = torch.cat([codes[:, :128], codes[:, 128:] + 1023], 1)
    assert "within 1023" in (reroute_reason(q, q, q, lists, windows=replace(windows, k_code=wide)) or "")
    bits = pack_bits(torch.ones(1, 1, 2, 2, dtype=torch.uint8))
    pooled = Pooled(q[:, :, :2], q[:, :, :2], torch.zeros(1, 1, 2), bits)
    assert "pooled remainder" in (reroute_reason(q, q, q, lists, windows=windows, pooled=pooled) or "")
    odd = torch.randn(1, 2, 256, 68).bfloat16()[..., :64]
    assert "multiples of 16 bytes" in (reroute_reason(q, odd, q, lists) or "")


@pytest.mark.gpu
@pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")
def test_rerouted_calls_are_computed() -> None:
    q = torch.randn(1, 2, 256, 64, device="cuda").bfloat16()
    lists = lists_from_levels(torch.ones(1, 1, 2, 2, dtype=torch.uint8, device="cuda"), 128, 128)
    valid = torch.arange(256, device="cuda")[None] < 200
    got = run_hopper(q, q, q, lists, scale=0.125, key_valid=valid, return_lse=True)[0]
    want = block_sparse_reference(q.float(), q.float(), q.float(), lists, scale=0.125, key_valid=valid)[0]
    assert (got.float() - want).abs().max() < 3e-2


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--group"]:
        torch.backends.cuda.matmul.allow_tf32 = False
        # Uninitialised memory is filled with NaN, so what the kernel does not write shows.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        for case in GROUPS[arguments[1]]:
            sys.stdout.write(f"{case}\n")
            sys.stdout.flush()
            run_case(case)
        return 0
    if not IS_HOPPER:
        sys.stdout.write(f"needs a GPU of compute capability 9.0; {len(GROUPS)} groups not run\n")
        return 2
    for name in arguments or GROUPS:
        began = time.perf_counter()
        passed, said = run_group(name)
        sys.stdout.write(f"{'ok  ' if passed else 'FAIL'} {time.perf_counter() - began:6.1f} s  {name}\n")
        sys.stdout.flush()
        if not passed:
            sys.stdout.write(f"{said}\n")
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
