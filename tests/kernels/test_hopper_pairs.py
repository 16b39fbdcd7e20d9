"""The Hopper kernel for query blocks of 64 against the masked reference, on a GPU of compute capability 9.0.

Each group of cases runs in a process of its own under a time limit, as in ``test_hopper.py``.
``PYTHONPATH=.:kernels python tests/kernels/test_hopper_pairs.py [group ...]`` runs all groups up to the first failure.
"""

from __future__ import annotations

import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from dit_accel_kernels.backends import run_backend, why_not
from dit_accel_kernels.block_sparse import hopper_pairs_launch
from dit_accel_kernels.block_sparse.hopper_pairs_launch import (
    block_sparse_pairs,
    run_pairs,
    why_not_call,
    why_not_pairs,
)
from dit_accel_kernels.block_sparse.hopper_pairs_specs import pairs_config
from dit_accel_kernels.block_sparse.reference import block_sparse_reference
from dit_accel_kernels.lists import lists_from_levels, pack_bits
from dit_accel_kernels.types import Pooled, TokenOrder, TokenWindows
from tests.kernels.groups import run_in_a_process
from tests.kernels.test_hopper import IS_HOPPER, LSE_TOLERANCE, TOLERANCE


@dataclass(frozen=True)
class Case:
    sq: int = 1024
    sk: int = 1024
    dim: int = 128
    block_k: int = 64
    batch: int = 2
    heads: int = 3
    dtype: torch.dtype = torch.bfloat16
    density: float = 0.4
    mask: str = "random"
    shared: bool = False
    bshd: bool = True
    partial: bool = False
    pooled: bool = False
    order: bool = False
    poison: bool = False
    programs: int | None = None
    valid: bool = False
    wild: bool = False
    fast: bool = True
    lse: bool = True
    tile: int | None = None
    stages: int | None = None
    seed: int = 0


def draw_levels(case: Case, gen: torch.Generator) -> torch.Tensor:
    """Levels ``[B|1, H|1, Qb, Kb]``, with more or less in common between neighbouring rows."""
    qb, kb = -(-case.sq // 64), -(-case.sk // case.block_k)
    shape = (1, 1) if case.shared else (case.batch, case.heads)
    draw = torch.rand(*shape, qb, kb, generator=gen)
    if case.mask == "alike":
        draw = draw[:, :, torch.arange(qb) // 2]
    keep = draw < case.density
    side = torch.arange(qb)[:, None] % 2 == 0
    if case.mask == "disjoint":
        keep &= side == (torch.arange(kb) % 2 == 0)
    if case.mask == "one empty":
        keep &= side
    if case.mask == "uneven":
        keep |= side
    levels = keep.to(torch.uint8)
    if case.partial:
        levels = torch.where((torch.rand(levels.shape, generator=gen) < 0.5) & keep, 255, levels).byte()
    return levels


def run_case(case: Case) -> None:
    gen = torch.Generator().manual_seed(case.seed)
    device = torch.device("cuda")

    def draw(tokens: int, bshd: bool) -> torch.Tensor:
        shape = (case.batch, tokens, case.heads) if bshd else (case.batch, case.heads, tokens)
        x = torch.randn(*shape, case.dim, generator=gen).to(device, case.dtype)
        return x.transpose(1, 2) if bshd else x

    q, k, v = (draw(tokens, case.bshd) for tokens in (case.sq, case.sk, case.sk))
    if case.wild:  # logits that overflow relative to those of the first tile, in some heads
        k = k * torch.logspace(0, 2, case.sk, device=device).to(k.dtype)[:, None]
    kb = -(-case.sk // case.block_k)
    levels = draw_levels(case, gen)
    lists = lists_from_levels(levels.to(device), 64, case.block_k)
    lists = lists if case.partial else replace(lists, partial=None)
    call: dict[str, Any] = {"scale": case.dim**-0.5}
    if case.pooled:
        bias = torch.randn(case.batch, 1, kb, generator=gen) + 3
        bias[..., kb // 2] = -torch.inf
        call["pooled"] = Pooled(draw(kb, False), draw(kb, False), bias.to(device), pack_bits(levels).to(device))
    if case.order:
        table = torch.stack([torch.randperm(case.sq, generator=gen) for _ in range(3)]).int().to(device)
        call["order"] = TokenOrder(table, torch.randint(0, 3, (case.heads,), generator=gen).int().to(device))
    if case.poison:
        unseen = (levels.expand(case.batch, case.heads, -1, -1) == 0).all(2)
        unseen = unseen.repeat_interleave(case.block_k, -1)[..., : case.sk, None].to(device)
        k, v = k.masked_fill(unseen, torch.nan), v.masked_fill(unseen, torch.nan)
    if case.valid:
        valid = torch.rand(case.batch, case.sk, generator=gen) < 0.8
        valid[:, case.sk // 2 : case.sk // 2 + 150] = False  # some blocks hold nothing
        call["key_valid"] = valid.to(device)
    config = replace(pairs_config(case.dim), max_programs=case.programs, fast=case.fast)
    config = replace(config, tile=case.tile or config.tile, stages=case.stages or config.stages)
    out, lse = block_sparse_pairs(q, k, v, lists, config=config, **call)
    again, nothing = block_sparse_pairs(q, k, v, lists, config=config, return_lse=case.lse, **call)
    torch.cuda.synchronize()
    assert case.lse or nothing.numel() == 0
    if case.pooled:
        pooled = call["pooled"]
        call["pooled"] = replace(pooled, k=pooled.k.float(), v=pooled.v.float())
    want, want_lse = block_sparse_reference(q.float(), k.float(), v.float(), lists, **call)
    assert out.stride() == torch.empty_like(q).stride(), f"{case}: strides {out.stride()}"
    error = ((out.float() - want).norm() / want.norm().clamp_min(1e-6)).item()
    worst = (out.float() - want).abs().max().item()
    assert error <= TOLERANCE[case.dtype], f"{case}: relative error {error:.3g}, largest {worst:.3g}"
    assert torch.equal(out, again), f"{case}: two runs differ by {(out.float() - again.float()).abs().max().item()}"
    empty = want_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty), f"{case}: empty rows differ"
    off = (lse - want_lse).masked_fill(empty, 0).abs().max().item()
    assert off <= LSE_TOLERANCE * (10 if case.wild else 1), f"{case}: log-sum-exp differs by {off:.3g}"
    assert not out[empty].any(), f"{case}: rows without keys must be 0"


def random_cases(dim: int) -> list[Case]:
    """60 shapes on few compiled variants: all ragged, with partial blocks."""
    rng = random.Random(dim)
    return [
        Case(
            sq=rng.randint(1, 900),
            sk=rng.choice([0, 128, 640, 1280]) + rng.randint(1, 63),
            dim=dim,
            block_k=rng.choice([64, 64, 128]),
            batch=rng.randint(1, 2),
            heads=rng.randint(1, 3),
            density=rng.choice([0.0, 0.1, 0.5, 1.0]),
            mask=rng.choice(["random", "alike", "disjoint", "one empty", "uneven"]),
            shared=rng.random() < 0.3,
            bshd=rng.random() < 0.5,
            partial=True,
            pooled=rng.random() < 0.5,
            order=dim == 128 and rng.random() < 0.3,
            poison=rng.random() < 0.5,
            wild=rng.random() < 0.2,
            programs=rng.choice([1, 2, 5, None]),
            seed=seed,
        )
        for seed in range(60)
    ]


LONG = Case()
_RAGGED = replace(LONG, sq=1000, sk=1010, partial=True)
GROUPS: dict[str, list[Case]] = {
    "one tile": [replace(LONG, sq=128, sk=64, density=1.0, batch=1, heads=1)],
    "few tiles": [replace(LONG, sq=128, sk=64 * n, density=1.0, batch=1, heads=1) for n in (2, 3, 5, 16)],
    "many heads": [replace(LONG, sq=512, sk=512, density=1.0), LONG, replace(LONG, heads=60, shared=True)],
    "neighbours": [
        replace(LONG, mask=mask, density=density, programs=programs)
        for mask in ("alike", "disjoint", "one empty", "uneven")
        for density, programs in ((0.1, 3), (0.6, None), (1.0, 1))
    ],
    "jobs in turn": [replace(LONG, programs=n) for n in (7, 2, 1)],
    "empty rows": [replace(LONG, density=0.0), replace(LONG, density=0.05, poison=True, programs=4)],
    "ragged": [
        replace(_RAGGED, sq=1, sk=1, density=1.0),
        replace(_RAGGED, sq=65, sk=200, poison=True),
        replace(_RAGGED, programs=5, poison=True),
        replace(_RAGGED, sq=1100, sk=333, mask="uneven"),
        replace(_RAGGED, shared=True, bshd=False),
    ],
    "key blocks of 128": [
        replace(LONG, block_k=128),
        *(replace(_RAGGED, block_k=128, sk=sk, poison=True, programs=3) for sk in (1010, 960, 900, 70, 20)),
        replace(_RAGGED, block_k=128, pooled=True),
    ],
    "pooled": [
        replace(LONG, pooled=True),
        replace(LONG, pooled=True, density=0.0, programs=3),
        replace(LONG, pooled=True, sk=64 * 300, sq=330, density=0.1, programs=4),
        replace(_RAGGED, pooled=True, poison=True),
    ],
    "float16": [replace(_RAGGED, dtype=torch.float16), replace(_RAGGED, dtype=torch.float16, pooled=True, dim=64)],
    "head size 64": [
        replace(LONG, dim=64),
        replace(_RAGGED, dim=64, poison=True, programs=3),
        *(replace(LONG, dim=64, mask=mask, programs=5) for mask in ("alike", "disjoint", "one empty", "uneven")),
        replace(_RAGGED, dim=64, pooled=True, sk=64 * 150 + 3),
        replace(_RAGGED, dim=64, block_k=128),
        replace(_RAGGED, dim=64, order=True, pooled=True),
        replace(_RAGGED, dim=64, valid=True),
    ],
    "key_valid": [replace(LONG, valid=True), replace(_RAGGED, valid=True, pooled=True, programs=3)],
    "wild logits": [
        replace(LONG, wild=True),
        replace(LONG, wild=True, programs=1),
        replace(_RAGGED, wild=True, programs=5, pooled=True, dim=64),
        replace(_RAGGED, wild=True, order=True),
        replace(LONG, fast=False),
    ],
    "padded head sizes": [replace(_RAGGED, dim=dim) for dim in (40, 72, 80, 96)]
    + [replace(_RAGGED, dim=96, order=True)],
    "order": [replace(LONG, order=True), replace(_RAGGED, order=True, pooled=True, programs=3)],
    "no log-sum-exp": [replace(LONG, lse=False, programs=3)],
    "other shapes": [
        replace(LONG, tile=128, stages=3, programs=3),
        replace(LONG, tile=128, stages=3, mask="disjoint"),
        replace(_RAGGED, tile=128, stages=3),
        replace(LONG, dim=64, tile=64, stages=12),
        replace(LONG, stages=4, programs=2),
    ],
    **{f"random, {dim}": random_cases(dim) for dim in (128, 64)},
}


def run_group(name: str, scale: float = 1.0) -> tuple[bool, str]:
    """Run a group in a fresh process; whether it passed, and the end of what it said."""
    return run_in_a_process(__file__, "--group", name, limit=90.0 * scale)


@pytest.mark.gpu
@pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("name", GROUPS)
def test_equals_the_reference(name: str) -> None:
    passed, said = run_group(name)
    assert passed, said


def test_reasons_why_not() -> None:
    asked: dict[str, Any] = {"dtype": torch.bfloat16, "head_dim": 128, "block_k": 64}
    reason = why_not_pairs(device=torch.device("cpu"), block_q=64, **asked)
    assert "must be an NVIDIA GPU, got cpu" in (reason or "")


def test_rerouted_calls_have_a_reason() -> None:
    q = torch.randn(1, 2, 256, 64).bfloat16()
    lists = lists_from_levels(torch.ones(1, 1, 4, 4, dtype=torch.uint8), 64, 64)
    assert why_not_call(q, q, q, lists) is None
    codes = torch.arange(3 * 256, dtype=torch.int32).view(3, 256) // 32
    assert "windows" in (why_not_call(q, q, q, lists, windows=TokenWindows(codes, codes, codes)) or "")
    odd = torch.randn(1, 2, 256, 68).bfloat16()[..., :64]
    assert "multiples of 16 bytes" in (why_not_call(q, odd, q, lists) or "")
    many = torch.empty(1, 1, 64 * 32768, 64, dtype=torch.bfloat16, device="meta")
    assert "at most 2097088 keys, got 2097152" in (why_not_call(many, many, many, lists) or "")


def test_the_backend_sends_query_blocks_of_64_here(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, dict[str, Any]]] = []
    monkeypatch.setattr(hopper_pairs_launch, "run_pairs", lambda *args, **given: calls.append((args[3].block_q, given)))
    q = torch.zeros(1, 1, 128, 64)
    lists = lists_from_levels(torch.ones(1, 1, 2, 2, dtype=torch.uint8), 64, 64)
    run_backend("hopper", q, q, q, lists, scale=1.0, return_lse=False)
    assert calls == [(64, {"scale": 1.0, "return_lse": False, "gathered": None})]
    asked: dict[str, Any] = {"device": "cpu", "dtype": torch.bfloat16, "head_dim": 128, "block_k": 64}
    assert why_not("hopper", block_q=64, **asked) == why_not("hopper", block_q=128, **asked)


@pytest.mark.gpu
@pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")
def test_rerouted_calls_are_computed() -> None:
    q = torch.randn(1, 2, 256, 64, device="cuda").bfloat16()
    lists = lists_from_levels(torch.full((1, 1, 4, 4), 255, dtype=torch.uint8, device="cuda"), 64, 64)
    codes = torch.arange(3 * 256, dtype=torch.int32, device="cuda").view(3, 256) // 32
    call: dict[str, Any] = {"scale": 0.125, "windows": TokenWindows(codes - 1, codes + 2, codes)}
    got = run_pairs(q, q, q, lists, return_lse=True, **call)[0]
    want = block_sparse_reference(q.float(), q.float(), q.float(), lists, **call)[0]
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
    began = time.perf_counter()
    with ThreadPoolExecutor(int(arguments.pop(0)) if arguments[:1] and arguments[0].isdigit() else 6) as pool:
        failed = 0
        for name, (passed, said) in zip(arguments or GROUPS, pool.map(run_group, arguments or GROUPS), strict=True):
            sys.stdout.write(f"{'ok  ' if passed else 'FAIL'} {time.perf_counter() - began:6.1f} s  {name}\n")
            sys.stdout.write("" if passed else f"{said}\n")
            sys.stdout.flush()
            failed += not passed
    return failed


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
