"""Gathered keys in the Hopper kernel against the masked reference, on a GPU of compute capability 9.0.

As in ``test_hopper.py`` cases run in processes of their own under a time limit, since a wrong barrier hangs.
``PYTHONPATH=.:kernels python tests/kernels/test_pyramid_hopper.py`` runs all groups up to the first failure.
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import dataclass, replace

import pytest
import torch

from dit_accel_kernels.block_sparse.hopper_specs import hopper_config
from dit_accel_kernels.block_sparse.reference import block_sparse_reference
from dit_accel_kernels.lists import gathered_from_mask, lists_from_levels, pack_bits
from dit_accel_kernels.pyramid import pyramid, pyramid_groups
from dit_accel_kernels.pyramid.hopper_launch import gathered_hopper, why_not_gathered
from dit_accel_kernels.types import BlockLists, GatheredKeys, Pooled, TokenOrder, TokenWindows
from tests.kernels.groups import run_in_a_process

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
# As in test_hopper.py: weights and output are rounded once each, the log-sum-exp is float32.
TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1e-3}
LSE_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Case:
    sq: int = 128
    sk: int = 128
    extra: int = 128
    group: int = 16
    dim: int = 128
    block_k: int = 128
    batch: int = 1
    heads: int = 1
    dtype: torch.dtype = torch.bfloat16
    density: float = 1.0
    more_density: float = 1.0
    list_shape: tuple[int, int] = (1, 1)
    more_shape: tuple[int, int] = (1, 1)
    bshd: bool = True
    partial: bool = False
    pooled: bool = False
    order: bool = False
    poison: bool = False
    hidden: bool = False  # keys with a bias of -inf
    even: bool = False  # no key has a bias
    valid: bool = False
    wild: bool = False
    levels: bool = False  # a map of pyramid levels instead of random lists
    mixed: bool = False  # head 0 has exact blocks only, 1 gathered keys only, 2 the remainder only, 3 all
    programs: int | None = None
    fast: bool | None = None
    lse: bool = True
    seed: int = 0


@dataclass
class Inputs:
    """The tensors of a case, and its masks of blocks and groups."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lists: BlockLists
    gathered: GatheredKeys
    call: dict[str, object]


def _draw(case: Case, gen: torch.Generator, tokens: int, bshd: bool) -> torch.Tensor:
    shape = (case.batch, tokens, case.heads) if bshd else (case.batch, case.heads, tokens)
    x = torch.randn(*shape, case.dim, generator=gen).to("cuda", case.dtype)
    return x.transpose(1, 2) if bshd else x


def make(case: Case) -> Inputs:
    """Draw the inputs of a case."""
    gen = torch.Generator().manual_seed(case.seed)
    q, k, v = (_draw(case, gen, tokens, case.bshd) for tokens in (case.sq, case.sk, case.sk))
    qb, kb = -(-case.sq // 128), -(-case.sk // case.block_k)
    valid = None
    if case.valid:
        valid = torch.rand(case.batch, case.sk, generator=gen) < 0.8
        valid[:, case.sk // 2 : case.sk // 2 + 150] = False  # some blocks hold nothing
        valid = valid.cuda()
    if case.levels:
        drawn = torch.randint(0, 5, (*case.list_shape, qb, kb), generator=gen)
        level_map = torch.tensor([0, 1, 2, 4, 8], dtype=torch.uint8)[drawn]
        levels = (level_map == 1).to(torch.uint8)
        made = pyramid(k, v, block=case.block_k, key_valid=valid)
        rows = gathered_from_mask(pyramid_groups(level_map.cuda()))
        more = GatheredKeys(made.k, made.v, made.bias, *rows, made.group)
    else:
        levels = (torch.rand(*case.list_shape, qb, kb, generator=gen) < case.density).to(torch.uint8)
        mask = torch.rand(*case.more_shape, qb, -(-case.extra // case.group), generator=gen) < case.more_density
        bias = torch.randn(*case.more_shape, case.extra, generator=gen)
        if case.even:
            bias = torch.zeros_like(bias)
        if case.mixed:
            levels[:, 1:3] = 0
            mask[:, 0] = mask[:, 2] = False
        if case.hidden:
            bias[..., :: case.group + 3] = -torch.inf
        keys = [_draw(case, gen, case.extra, case.bshd) for _ in "kv"]
        if case.wild:  # logits that overflow relative to the maximum of the tile before
            keys[0] = keys[0].clone()  # with the strides of the values
            keys[0][:, :, 130:] *= 60
        more = GatheredKeys(*keys, bias.cuda(), *gathered_from_mask(mask.cuda()), case.group)
        if case.poison:
            unseen = ~mask.expand(case.batch, case.heads, -1, -1).any(2)
            unseen = unseen.repeat_interleave(case.group, -1)[..., : case.extra] | (bias == -torch.inf)
            there = unseen[..., None].cuda()
            more = replace(more, k=more.k.masked_fill(there, torch.nan), v=more.v.masked_fill(there, torch.nan))
    if case.partial:
        levels = torch.where((torch.rand(levels.shape, generator=gen) < 0.5) & (levels != 0), 255, levels).byte()
    lists = lists_from_levels(levels.cuda(), 128, case.block_k)
    if not case.partial:
        lists = replace(lists, partial=None)
    pooled = order = None
    if case.pooled:
        p_bias = torch.randn(case.batch, 1, kb, generator=gen) + 3
        p_bias[..., kb // 2] = -torch.inf
        means = [_draw(case, gen, kb, False) for _ in "kv"]
        exact = levels.clone()
        if case.mixed:
            exact[:, :2] = 1  # nothing of these heads is pooled
        pooled = Pooled(*means, p_bias.cuda(), pack_bits(exact).cuda())
    if case.order:
        table = torch.stack([torch.randperm(case.sq, generator=gen) for _ in range(3)]).int().cuda()
        order = TokenOrder(table, torch.randint(0, 3, (case.heads,), generator=gen).int().cuda())
    if case.poison:
        unseen = (levels.expand(case.batch, case.heads, -1, -1) == 0).all(2)
        unseen = unseen.repeat_interleave(case.block_k, -1)[..., : case.sk, None].cuda()
        k, v = k.masked_fill(unseen, torch.nan), v.masked_fill(unseen, torch.nan)
    call = {"scale": case.dim**-0.5, "order": order, "pooled": pooled, "key_valid": valid}
    return Inputs(q, k, v, lists, more, call)


def run_case(case: Case) -> None:
    """Compare a case with the reference, twice, and with itself."""
    p = make(case)
    config = replace(hopper_config(case.dim), max_programs=case.programs)
    if case.fast is not None:
        config = replace(config, fast=case.fast)
    known = p.gathered if case.group in (1, 8, 16) else replace(p.gathered, group=16)
    assert why_not_gathered(p.q, p.k, p.v, p.lists, known) is None
    tensors = (p.q, p.k, p.v, p.lists, p.gathered)
    out, lse = gathered_hopper(*tensors, config=config, **p.call)  # type: ignore[arg-type]
    again, _ = gathered_hopper(*tensors, config=config, return_lse=case.lse, **p.call)  # type: ignore[arg-type]
    torch.cuda.synchronize()
    call: dict[str, object] = dict(p.call)
    if isinstance(pooled := call["pooled"], Pooled):
        call["pooled"] = replace(pooled, k=pooled.k.float(), v=pooled.v.float())
    floats = [x.float() for x in (p.q, p.k, p.v)]
    more = replace(p.gathered, k=p.gathered.k.float(), v=p.gathered.v.float())
    want, want_lse = block_sparse_reference(*floats, p.lists, gathered=more, **call)  # type: ignore[arg-type]
    assert out.stride() == torch.empty_like(p.q).stride(), f"{case}: strides {out.stride()}"
    assert torch.equal(out, again), f"{case}: two runs differ by {(out.float() - again.float()).abs().max().item()}"
    error = ((out.float() - want).norm() / want.norm().clamp_min(1e-6)).item()
    worst = (out.float() - want).abs().max().item()
    assert error <= TOLERANCE[case.dtype], f"{case}: relative error {error:.3g}, largest {worst:.3g}"
    empty = want_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty), f"{case}: empty rows differ"
    off = (lse - want_lse).masked_fill(empty, 0).abs().max().item()
    assert off <= LSE_TOLERANCE * (10 if case.wild else 1), f"{case}: log-sum-exp differs by {off:.3g}"
    assert not out[empty].any(), f"{case}: rows without keys must be 0"


def random_cases(dim: int, block_k: int, group: int) -> list[Case]:
    """25 shapes on few compiled variants: all ragged, with partial blocks."""
    rng = random.Random(dim + block_k + group)
    cases = []
    for seed in range(25):
        batch, heads = rng.randint(1, 2), rng.randint(1, 3)
        shapes = [(rng.choice([1, batch]), rng.choice([1, heads])) for _ in range(2)]
        cases.append(
            Case(
                sq=rng.randint(1, 900),
                sk=rng.choice([128, 256, 640]) + rng.randint(1, 63),
                extra=rng.randint(1, 1500),
                group=group,
                dim=dim,
                block_k=block_k,
                batch=batch,
                heads=heads,
                density=rng.choice([0.0, 0.1, 0.5, 1.0]),
                more_density=rng.choice([0.0, 0.05, 0.5, 1.0]),
                list_shape=shapes[0],
                more_shape=shapes[1],
                bshd=rng.random() < 0.5,
                partial=True,
                pooled=rng.random() < 0.5,
                poison=rng.random() < 0.5,
                hidden=rng.random() < 0.5,
                even=rng.random() < 0.4,
                wild=rng.random() < 0.2,
                programs=rng.choice([1, 2, 5, None]),
                seed=seed,
            )
        )
    return cases


LONG = Case(
    sq=1024, sk=1024, extra=1000, heads=3, batch=2, density=0.4, more_density=0.4, list_shape=(2, 3), more_shape=(2, 3)
)
COLUMNS = replace(LONG, group=1, more_density=0.2)
GROUPS: dict[str, list[Case]] = {
    "one tile": [Case(), replace(Case(), extra=100), replace(Case(), extra=1)],
    "tiles": [Case(extra=256), Case(extra=384), Case(extra=1000), Case(sk=512, extra=512), LONG],
    "no bias": [
        replace(Case(), group=1, extra=300, even=True),
        replace(Case(), extra=1000, sk=1000, even=True, programs=1, heads=3),
        replace(LONG, even=True, group=1, poison=True, programs=5),
        replace(LONG, even=True, group=1, density=0.0, programs=3),
        replace(LONG, even=True, density=0.05, more_density=0.6, pooled=True, sk=1000, programs=7),
        replace(LONG, even=True, valid=True, group=1, sk=1000),
        replace(LONG, even=True, wild=True, programs=2),
    ],
    "jobs in turn": [replace(LONG, programs=n) for n in (7, 2, 1)] + [replace(LONG, more_shape=(1, 1))],
    "columns": [replace(Case(), group=1), COLUMNS, replace(COLUMNS, poison=True, hidden=True, programs=5)],
    "empty": [
        replace(LONG, density=0.0, more_density=0.0),
        replace(LONG, density=0.1, more_density=0.02, programs=4, poison=True),
        replace(LONG, density=0.0),
        replace(LONG, more_density=0.0),
    ],
    "hidden": [replace(LONG, hidden=True, poison=True), replace(LONG, hidden=True, density=0.0, programs=3)],
    "ragged": [
        replace(LONG, sq=130, sk=200, extra=133),
        replace(LONG, sq=1, sk=1, extra=1, density=1.0, more_density=1.0),
        replace(LONG, sq=900, sk=1000, extra=999, programs=5, poison=True),
    ],
    "pyramid": [
        replace(LONG, levels=True),
        replace(LONG, levels=True, sk=1000),
        replace(LONG, levels=True, block_k=64),
    ],
    "pyramid, padding": [replace(LONG, levels=True, valid=True, sk=1000)],
    "heads of four kinds": [
        replace(LONG, mixed=True, pooled=True, heads=4, list_shape=(1, 4), more_shape=(1, 4), programs=n)
        for n in (None, 3)
    ],
    "pooled": [replace(LONG, pooled=True), replace(LONG, pooled=True, density=0.0, programs=3)],
    "order": [replace(COLUMNS, order=True), replace(LONG, order=True, levels=True, sq=1000, sk=1000, programs=3)],
    "layouts": [replace(LONG, bshd=False), replace(LONG, more_shape=(2, 1)), replace(LONG, list_shape=(1, 1))],
    "wild logits": [replace(LONG, wild=True), replace(LONG, wild=True, programs=1, density=0.0)],
    "float16": [replace(LONG, dtype=torch.float16), replace(COLUMNS, dtype=torch.float16, pooled=True)],
    "head size 64": [replace(LONG, dim=64), replace(COLUMNS, dim=64, sk=1000, programs=3, hidden=True)],
    "padded head sizes": [replace(LONG, dim=dim, block_k=64, sk=1000, group=8) for dim in (40, 72, 96)],
    "no log-sum-exp": [replace(LONG, lse=False, programs=3)],
    "other groups": [replace(LONG, group=n, hidden=True) for n in (2, 4, 32, 64)],
    **{
        f"random, {d} by {k}, groups of {g}": random_cases(d, k, g)
        for d, k, g in ((128, 128, 16), (128, 64, 8), (128, 128, 1), (64, 64, 1))
    },
}


# Groups that share a process, and mostly their compiled kernels; the simplest first.
TOGETHER = [
    ["one tile", "tiles", "jobs in turn", "empty", "hidden", "layouts", "wild logits", "no log-sum-exp"],
    ["columns", "no bias", "order"],
    ["ragged", "pyramid", "pyramid, padding"],
    ["heads of four kinds", "pooled", "float16"],
    ["head size 64", "padded head sizes", "other groups"],
    *([name] for name in GROUPS if name.startswith("random")),
]


def run_groups(names: list[str], limit: float = 150.0) -> tuple[bool, str]:
    """Run groups in a fresh process; whether they passed, and the end of what it said."""
    return run_in_a_process(__file__, "--groups", *names, limit=limit)


def test_every_group_is_run() -> None:
    assert sorted(name for names in TOGETHER for name in names) == sorted(GROUPS)


@pytest.mark.gpu
@pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("names", TOGETHER, ids=lambda names: names[0])
def test_equals_the_reference(names: list[str]) -> None:
    passed, said = run_groups(names)
    assert passed, said


def _call(**change: object) -> str | None:
    q = torch.randn(1, 2, 256, 64).bfloat16()
    lists = lists_from_levels(torch.ones(1, 1, 2, 2, dtype=torch.uint8), 128, 128)
    rows = gathered_from_mask(torch.ones(1, 1, 2, 16, dtype=torch.bool))
    more = replace(GatheredKeys(q, q, torch.zeros(1, 1, 256), *rows, 16), **change)  # type: ignore[arg-type]
    return why_not_gathered(q, q, q, lists, more)


def test_rerouted_calls_have_a_reason() -> None:
    assert _call() is None
    odd = torch.randn(1, 2, 256, 68).bfloat16()[..., :64]
    assert "gathered.v must have an address and strides" in (_call(v=odd) or "")
    assert _call(group=4) == "gathered.group must be one of (1, 8, 16), got 4"
    apart = torch.randn(1, 2, 256, 128).bfloat16()[..., :64]
    assert "must have one token stride" in (_call(v=apart) or "")
    shifted = torch.randn(2 * 256 * 64 + 1).bfloat16()[1:].view(1, 2, 256, 64)
    assert "gathered.k must have an address and strides" in (_call(k=shifted) or "")


def test_windows_and_padding_are_left_to_triton() -> None:
    q = torch.randn(1, 2, 256, 64).bfloat16()
    lists = lists_from_levels(torch.ones(1, 1, 2, 2, dtype=torch.uint8), 128, 128)
    rows = gathered_from_mask(torch.ones(1, 1, 2, 16, dtype=torch.bool))
    more = GatheredKeys(q, q, torch.zeros(1, 1, 256), *rows, 16)
    codes = torch.zeros(3, 256, dtype=torch.int32)
    reason = why_not_gathered(q, q, q, lists, more, windows=TokenWindows(codes, codes, codes))
    assert reason == "token windows are not supported together with gathered keys"
    reason = why_not_gathered(q, q, q, lists, more, key_valid=torch.ones(1, 256, dtype=torch.bool))
    assert reason == "key_valid together with gathered keys has not run on a GPU yet"


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--groups"]:
        torch.backends.cuda.matmul.allow_tf32 = False
        # Uninitialised memory is filled with NaN, so what the kernel does not write shows.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        for name in arguments[1:]:
            for case in GROUPS[name]:
                sys.stdout.write(f"{name}: {case}\n")
                sys.stdout.flush()
                run_case(case)
        return 0
    if not IS_HOPPER:
        sys.stdout.write(f"needs a GPU of compute capability 9.0; {len(GROUPS)} groups not run\n")
        return 2
    for names in [[name] for name in arguments] or TOGETHER:
        began = time.perf_counter()
        passed, said = run_groups(names)
        sys.stdout.write(f"{'ok  ' if passed else 'FAIL'} {time.perf_counter() - began:6.1f} s  {', '.join(names)}\n")
        sys.stdout.flush()
        if not passed:
            sys.stdout.write(f"{said}\n")
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
