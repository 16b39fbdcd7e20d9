"""The 8-bit Hopper kernel against attention in float32 on the same codes, on a GPU of compute capability 9.0.

A wrong barrier does not fail, it hangs. So each group of cases runs in a process of its own under a hard time limit.
``PYTHONPATH=.:kernels python tests/kernels/test_hopper8.py`` runs all groups, eight at once.
"""

from __future__ import annotations

import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel_kernels.lists import lists_from_levels, pack_bits
from dit_accel_kernels.quantize import PRECISIONS, QuantizedQKV, quantize_qkv
from dit_accel_kernels.quantized.hopper8_launch import quantized_hopper, reroute_reason, run_hopper8, why_not_hopper8
from dit_accel_kernels.quantized.hopper8_specs import hopper8_config
from dit_accel_kernels.quantized.reference import quantized_reference
from dit_accel_kernels.types import BlockLists, Pooled, TokenOrder
from tests.kernels.groups import run_in_a_process

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
# Relative to the norm of the reference. Products are exact; bfloat16 weights are off by up to 2^-9, e4m3 ones by up to 2^-4
# (2.6 % in the mean square of a uniform mantissa), which is what is left of it in the output of random values.
TOLERANCE = {"bf16": 6e-3, "fp8": 4e-2}
# The log-sum-exp is that of the weights as they were multiplied: a row that one key dominates has its rounding.
LSE_TOLERANCE = {"bf16": 3e-3, "fp8": 0.11}


@dataclass(frozen=True)
class Case:
    sq: int = 128
    sk: int = 128
    dim: int = 128
    block_k: int = 128
    batch: int = 1
    heads: int = 1
    dtype: torch.dtype = torch.bfloat16
    precision: str = "int8"
    density: float = 1.0
    list_shape: tuple[int, int] = (1, 1)
    bshd: bool = True
    partial: bool = False
    order: bool = False
    poison: bool = False
    programs: int | None = None
    kind: str = "random"
    lse: bool = True
    pooled: bool = False
    stages: int | None = None
    seed: int = 0


def inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and levels. ``kind`` "wild": logits of all blocks but the last, which comes first, are 60 times larger.

    "rising": logits grow from block to block in the order of visits, so that bases must change often. "sink": one key has
    far the largest logit. "flat": all keys are alike. "ones": values are 1, so that any weight lost shows in the output.
    """
    gen = torch.Generator().manual_seed(case.seed)

    def draw(tokens: int) -> Tensor:
        shape = (case.batch, tokens, case.heads) if case.bshd else (case.batch, case.heads, tokens)
        x = torch.randn(*shape, case.dim, generator=gen)
        return x.transpose(1, 2) if case.bshd else x

    q, k, v = draw(case.sq), draw(case.sk), draw(case.sk)
    if case.kind == "wild":
        k = torch.cat([k[:, :, : -case.block_k] * 60, k[:, :, -case.block_k :]], 2)
    if case.kind == "rising":
        k = k * torch.linspace(6, 0.2, case.sk)[:, None]
    if case.kind == "sink":
        k = k * 0.3
        k[:, :, case.sk // 2] = q[:, :, : case.sk // 64 + 1].mean(2) * 8
    if case.kind == "flat":
        k = k * 1e-3
    if case.kind == "ones":
        v = torch.ones_like(v)
    qb, kb = -(-case.sq // 128), -(-case.sk // case.block_k)
    levels = (torch.rand(*case.list_shape, qb, kb, generator=gen) < case.density).to(torch.uint8)
    if case.partial:
        levels = torch.where((torch.rand(levels.shape, generator=gen) < 0.5) & (levels != 0), 255, levels).byte()
    return q.to(device, case.dtype), k.to(device, case.dtype), v.to(device, case.dtype), levels.to(device)


def poisoned(made: QuantizedQKV, levels: Tensor, case: Case) -> QuantizedQKV:
    """NaN wherever a codes' format has it, in all blocks that no row visits."""
    unseen = (levels.expand(case.batch, case.heads, -1, -1) == 0).all(2)  # [B, H, Kb]
    tokens = unseen.repeat_interleave(case.block_k, -1)[..., : case.sk]
    k, v = made.k.clone(), made.v.clone()
    k.view(torch.int8)[tokens] = 127  # NaN in e4m3
    if made.precision.pv == "fp8":
        wide = torch.zeros(*tokens.shape[:2], v.shape[-1], dtype=torch.bool, device=v.device)
        wide[..., : tokens.shape[-1] // 16 * 16] = tokens[..., : tokens.shape[-1] // 16 * 16]
        v.view(torch.int8).masked_fill_(wide[:, :, None], 127)
    else:
        v = v.masked_fill(tokens[..., None], torch.nan)
    return replace(made, k=k, v=v, k_scale=made.k_scale.masked_fill(unseen, torch.nan))


def run_case(case: Case) -> None:
    device = torch.device("cuda")
    q, k, v, levels = inputs(case, device)
    lists = lists_from_levels(levels, 128, case.block_k)
    if not case.partial:
        lists = replace(lists, partial=None)
    order = None
    if case.order:
        gen = torch.Generator().manual_seed(case.seed + 1)
        table = torch.stack([torch.randperm(case.sq, generator=gen) for _ in range(3)]).int().to(device)
        order = TokenOrder(table, torch.randint(0, 3, (case.heads,), generator=gen).int().to(device))
    pooled = None
    if case.pooled:
        gen = torch.Generator().manual_seed(case.seed + 2)
        kb = levels.shape[-1]
        means = [
            torch.randn(case.batch, case.heads, kb, case.dim, generator=gen).to(device, case.dtype) for _ in range(2)
        ]
        bias = (torch.randn(case.batch, 1, kb, generator=gen) + 3).to(device)
        pooled = Pooled(means[0], means[1], bias, pack_bits(levels))
    precision = PRECISIONS[case.precision]
    made = quantize_qkv(q, k, v, precision, block_k=case.block_k, order=order, backend="reference")
    want, want_lse = quantized_reference(q, made, lists, scale=case.dim**-0.5, order=order, pooled=pooled)
    if case.poison:
        made = poisoned(made, levels, case)
    config = replace(hopper8_config(made.unpacked().k.shape[-1], precision.pv), max_programs=case.programs)
    if case.stages is not None:
        config = replace(config, stages=case.stages)
    call: dict[str, Any] = {"scale": case.dim**-0.5, "order": order, "pooled": pooled, "config": config}
    out, lse = quantized_hopper(q, made, lists, **call)
    again, nothing = quantized_hopper(q, made, lists, return_lse=case.lse, **call)
    torch.cuda.synchronize()
    assert case.lse or case.pooled or nothing.numel() == 0
    check(case, out, lse, again, want, want_lse)
    assert out.stride() == torch.empty_like(q).stride(), f"{case}: strides {out.stride()}"


def check(case: Case, out: Tensor, lse: Tensor, again: Tensor, want: Tensor, want_lse: Tensor) -> None:
    tolerance = TOLERANCE[PRECISIONS[case.precision].pv]
    assert torch.equal(out, again), f"{case}: two runs differ by {(out.float() - again.float()).abs().max().item()}"
    error = ((out.float() - want.float()).norm() / want.float().norm().clamp_min(1e-6)).item()
    worst = (out.float() - want.float()).abs().max().item()
    assert error <= tolerance, f"{case}: relative error {error:.3g}, largest {worst:.3g}"
    empty = want_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty), f"{case}: empty rows differ"
    off = (lse - want_lse).masked_fill(empty, 0).abs().max().item()
    allowed = LSE_TOLERANCE[PRECISIONS[case.precision].pv] * (10 if case.kind == "wild" else 1)
    assert off <= allowed, f"{case}: log-sum-exp differs by {off:.3g}, at most {allowed:g} is allowed"
    assert not out[empty].any(), f"{case}: rows without keys must be 0"
    sys.stdout.write(f"error {error:.2e} lse {off:.1e} {case}\n")
    sys.stdout.flush()


def random_cases(precision: str, dim: int, block_k: int) -> list[Case]:
    """40 shapes on few compiled variants: all ragged, with partial blocks."""
    rng = random.Random(dim + block_k)
    cases = []
    for seed in range(40):
        batch, heads = rng.randint(1, 2), rng.randint(1, 3)
        cases.append(
            Case(
                sq=rng.randint(1, 900),
                sk=rng.choice([128, 256, 640]) * 2 + rng.randint(1, 63) if rng.random() < 0.7 else rng.randint(1, 63),
                dim=dim,
                block_k=block_k,
                batch=batch,
                heads=heads,
                precision=precision,
                density=rng.choice([0.0, 0.1, 0.5, 1.0]),
                list_shape=(rng.choice([1, batch]), rng.choice([1, heads])),
                bshd=rng.random() < 0.5,
                partial=True,
                order=rng.random() < 0.5,
                poison=rng.random() < 0.5,
                kind=rng.choice(["random", "random", "wild", "rising", "sink"]),
                programs=rng.choice([1, 2, 5, None]),
                seed=seed,
            )
        )
    return cases


LONG = Case(sq=1024, sk=1024, heads=3, batch=2, density=0.4, list_shape=(2, 3))


def groups(precision: str) -> dict[str, list[Case]]:
    base = replace(LONG, precision=precision)
    one = replace(Case(), precision=precision)
    return {
        "one tile": [one],
        "few tiles": [replace(one, sk=n) for n in (256, 384, 512, 1024)]
        + [replace(one, sq=512, sk=512, heads=3, batch=2)],
        "many": [
            replace(base, density=1.0),
            base,
            *(replace(base, programs=n) for n in (7, 2, 1)),
            replace(base, heads=60, list_shape=(1, 60)),
            replace(base, density=0.0),
            replace(base, density=0.1, poison=True, programs=4),
            replace(base, bshd=False),
            replace(base, lse=False, programs=3),
        ],
        "kinds": [
            replace(base, kind=kind, density=d) for kind in ("wild", "rising", "sink", "flat", "ones") for d in (1, 0.4)
        ],
        "ragged": [
            replace(one, sq=130, sk=200),
            replace(one, sq=1, sk=1),
            replace(base, sq=900, sk=1000, programs=5),
            replace(base, sq=1100, sk=333, poison=True),
            replace(base, sk=1000, partial=True, poison=True, programs=3),
        ],
        "order": [replace(base, order=True), replace(base, order=True, sq=1000, sk=1000, programs=3)],
        "pooled": [
            replace(base, pooled=True),
            replace(base, pooled=True, order=True, sk=1000, block_k=64),
            replace(base, pooled=True, density=0.0, dim=64),
        ],
        "key blocks of 64": [
            replace(one, block_k=64, sk=64),
            replace(one, block_k=64, sk=192),
            replace(base, block_k=64),
            replace(base, block_k=64, sk=1000, programs=3, poison=True),
            replace(base, block_k=64, kind="wild"),
        ],
        "head size 64": [
            replace(base, dim=64),
            replace(base, dim=64, sk=1000, programs=3),
            replace(base, dim=64, kind="wild"),
        ],
        "padded head sizes": [replace(base, dim=dim, block_k=64, sk=1000) for dim in (40, 72, 96)],
        # With e4m3 values three are needed.
        "few stages": [replace(base, stages=n, programs=3) for n in ((1, 2) if precision == "int8" else (3,))],
        "random, 128 by 64": random_cases(precision, 128, 64),
        "random, 64 by 128": random_cases(precision, 64, 128),
    }


GROUPS = {
    f"{precision}: {name}": cases
    for precision in ("int8", "int8_fp8", "fp8")
    for name, cases in groups(precision).items()
}
GROUPS["int4: many"] = [replace(LONG, precision="int4_fp8"), replace(LONG, precision="int4", order=True)]
GROUPS["float16: many"] = [replace(LONG, precision="fp8", dtype=torch.float16, order=o) for o in (False, True)]
LIMIT_S = 100.0


def run_group(name: str) -> tuple[bool, str]:
    """Run a group in a fresh process; whether it passed, and the end of what it said."""
    return run_in_a_process(__file__, "--group", name, limit=LIMIT_S)


@pytest.mark.gpu
@pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("name", GROUPS)
def test_equals_the_reference(name: str) -> None:
    passed, said = run_group(name)
    assert passed, said


def test_reasons_why_not() -> None:
    asked = {"dtype": torch.bfloat16, "head_dim": 128, "block_q": 128, "block_k": 128}
    reason = why_not_hopper8(device=torch.device("cpu"), precision=PRECISIONS["fp8"], **asked)
    assert "must be an NVIDIA GPU, got cpu" in (reason or "")


def _small(precision: str) -> tuple[Tensor, QuantizedQKV, BlockLists]:
    q = torch.randn(1, 2, 256, 64).bfloat16()
    lists = lists_from_levels(torch.ones(1, 1, 2, 2, dtype=torch.uint8), 128, 128)
    return q, quantize_qkv(q, q, q, precision, block_k=128, backend="reference"), lists


def test_rerouted_calls_have_a_reason() -> None:
    q, made, lists = _small("int8")
    assert reroute_reason(q, made, lists) is None
    valid = torch.ones(1, 256, dtype=torch.bool)
    assert "key_valid" in (reroute_reason(q, made, lists, key_valid=valid) or "")
    pooled = Pooled(
        q[:, :, :2], q[:, :, :2], torch.zeros(1, 1, 2), pack_bits(torch.ones(1, 1, 2, 2, dtype=torch.uint8))
    )
    assert reroute_reason(q, made, lists, pooled=pooled) is None
    assert reroute_reason(q, _small("int8_fp8")[1], lists, pooled=pooled) is None
    odd = torch.randn(1, 2, 256, 68).bfloat16()[..., :64]
    assert "multiples of 16 bytes" in (reroute_reason(q, replace(made, v=odd), lists) or "")


@pytest.mark.gpu
@pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("precision", ["int8", "int8_fp8", "fp8"])
def test_rerouted_calls_are_computed(precision: str) -> None:
    q = torch.randn(1, 2, 256, 64, device="cuda").bfloat16()
    lists = lists_from_levels(torch.ones(1, 1, 2, 2, dtype=torch.uint8, device="cuda"), 128, 128)
    valid = torch.arange(256, device="cuda")[None] < 200
    made = quantize_qkv(q, q, q, precision, block_k=128, key_valid=valid)
    got = run_hopper8(q, made, lists, scale=0.125, key_valid=valid, return_lse=True)[0]
    want = quantized_reference(q, made, lists, scale=0.125, key_valid=valid)[0]
    assert (got.float() - want.float()).abs().max() < 6e-2


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--group"]:
        torch.backends.cuda.matmul.allow_tf32 = False
        # Uninitialised memory is filled with NaN, so what the kernel does not write shows.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        for name in arguments[1:]:
            for case in GROUPS[name]:
                run_case(case)
            sys.stdout.write(f"passed {name}\n")
        return 0
    if not IS_HOPPER:
        sys.stdout.write(f"needs a GPU of compute capability 9.0; {len(GROUPS)} groups not run\n")
        return 2

    def timed(name: str) -> tuple[str, bool, str, float]:
        began = time.perf_counter()
        return (name, *run_group(name), time.perf_counter() - began)

    failed = 0
    with ThreadPoolExecutor(int(os.environ.get("JOBS", "8"))) as pool:
        for name, passed, said, seconds in pool.map(timed, arguments or GROUPS):
            failed += not passed
            last = said.strip().splitlines()[-1] if said.strip() else ""
            sys.stdout.write(f"{'ok  ' if passed else 'FAIL'} {seconds:6.1f} s  {name}  {last[:160]}\n")
            if not passed:
                sys.stdout.write(f"{said[-1200:]}\n")
            sys.stdout.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
