"""Block-sparse attention against a float64 oracle that knows nothing of lists, bits or blocks but the mask itself."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from dit_accel_kernels.block_sparse import block_sparse_attention
from dit_accel_kernels.lists import lists_from_levels, pack_bits
from dit_accel_kernels.types import BlockLists, Pooled, TokenOrder, TokenWindows
from tests.kernels.interpreter import repair

repair()

# Largest difference to float64, for outputs of about unit size. float32: some hundred roundings of 2**-24 in sums of up to
# 500 terms, 3xTF32 on a GPU included. float16 and bfloat16: the weights and the output are rounded once each (2**-11 and
# 2**-8 of values up to 4). The log-sum-exp is float32 throughout, but torch's CPU kernel takes a coarser exponential
# (2**-12) for the 16-bit types.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LSE_TOLERANCE = {torch.float64: 2e-6, torch.float32: 2e-5, torch.float16: 3e-4, torch.bfloat16: 3e-4}

RUNNERS = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("cpu", "cpu"), id="cpu"),
    pytest.param(("triton", "cpu"), id="interpreter", marks=pytest.mark.interpreter),
    pytest.param(("triton", "cuda"), id="gpu", marks=pytest.mark.gpu),
]


@dataclass(frozen=True)
class Case:
    name: str
    sq: int = 111
    sk: int = 111
    dim: int = 64
    block_q: int = 64
    block_k: int = 64
    batch: int = 1
    heads: int = 2
    dtype: torch.dtype = torch.float32
    density: float = 0.5
    list_shape: tuple[int, int] = (1, 2)
    order: bool = False
    pooled: bool = False
    windows: bool = False
    valid: bool = False
    seed: int = 0

    def __str__(self) -> str:
        return self.name


@dataclass
class Problem:
    """Inputs and what they mean: ``allowed [B, H, Sq, Sk]`` in block order and the extra keys of each query row."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    levels: torch.Tensor
    lists: BlockLists
    order: TokenOrder | None
    pooled: Pooled | None
    windows: TokenWindows | None
    key_valid: torch.Tensor | None

    def extras(self) -> dict[str, object]:
        return {"order": self.order, "pooled": self.pooled, "windows": self.windows, "key_valid": self.key_valid}


def make(case: Case, device: str) -> Problem:
    gen = torch.Generator().manual_seed(case.seed)

    def view(tokens: int) -> torch.Tensor:
        """[B, H, S, D] as models hand it over: a view of [B, S, H, D]."""
        x = torch.randn(case.batch, tokens, case.heads, case.dim, generator=gen)
        return x.to(device, case.dtype).transpose(1, 2)

    q, k, v = view(case.sq), view(case.sk), view(case.sk)
    qb, kb = -(-case.sq // case.block_q), -(-case.sk // case.block_k)
    levels = (torch.rand(*case.list_shape, qb, kb, generator=gen) < case.density).to(torch.uint8)
    order = pooled = windows = key_valid = None
    if case.windows:
        levels = torch.where((torch.rand(levels.shape, generator=gen) < 0.5) & (levels != 0), 255, levels).byte()

        def code(low: int, high: int, n: int) -> torch.Tensor:
            return torch.randint(low, high, (3, n), generator=gen, dtype=torch.int32).to(device)

        windows = TokenWindows(code(-1, 4, case.sq), code(4, 9, case.sq), code(-1, 8, case.sk))
    if case.order:
        table = torch.stack([torch.randperm(case.sq, generator=gen) for _ in range(3)]).int().to(device)
        order = TokenOrder(table, torch.randint(0, 3, (case.heads,), generator=gen).int().to(device))
    if case.pooled:
        means = [torch.randn(case.batch, case.heads, kb, case.dim, generator=gen).to(device, case.dtype) for _ in "kv"]
        bias = torch.randn(case.batch, 1, kb, generator=gen)
        bias[..., kb // 2] = -torch.inf
        pooled = Pooled(*means, bias.to(device), pack_bits(levels).to(device))
    if case.valid:
        key_valid = (torch.rand(case.batch, case.sk, generator=gen) < 0.8).to(device)
    lists = lists_from_levels(levels.to(device), case.block_q, case.block_k)
    if not case.windows:
        lists = replace(lists, partial=None)
    return Problem(q, k, v, levels, lists, order, pooled, windows, key_valid)


def oracle(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense float64 attention under an explicit token mask, on the CPU."""
    q, k, v = (x.detach().cpu().double() for x in (p.q, p.k, p.v))
    (batch, heads, sq, dim), sk = q.shape, k.shape[2]
    place = torch.arange(sq).expand(heads, sq)
    if p.order is not None:
        place = p.order.table.cpu()[p.order.head.cpu().long()].long().argsort(-1)  # natural -> block order
    key = torch.arange(sk)
    level = p.levels.expand(batch, heads, -1, -1)
    seen = torch.empty(batch, heads, sq, sk, dtype=torch.bool)
    extra = torch.full((batch, heads, sq, 0), -torch.inf, dtype=torch.float64)
    for h in range(heads):
        row = place[h]
        cell = level[:, h][:, row // p.lists.block_q][..., key // p.lists.block_k]
        seen[:, h] = cell != 0
        if p.windows is not None:
            lo, hi, code = (x.cpu() for x in (p.windows.q_lo, p.windows.q_hi, p.windows.k_code))
            inside = (lo[:, row, None] <= code[:, None]) & (code[:, None] < hi[:, row, None])
            seen[:, h] &= (cell == 1) | inside.all(0) | (code[0] < 0)
    if p.key_valid is not None:
        seen &= p.key_valid.cpu()[:, None, None]
    logits = (q @ k.mT * dim**-0.5).masked_fill(~seen, -torch.inf)
    if p.pooled is not None:
        bias = p.pooled.bias.cpu().double()[:, :, None]
        extra = q @ p.pooled.k.cpu().double().mT * dim**-0.5 + bias
        row = place[None, :, :, None] // p.lists.block_q
        extra = extra.masked_fill(level.gather(2, row.expand(batch, -1, -1, extra.shape[-1])) != 0, -torch.inf)
        v = torch.cat([v, p.pooled.v.cpu().double()], 2)
    logits = torch.cat([logits, extra], -1)
    return logits.softmax(-1).nan_to_num(0) @ v, logits.logsumexp(-1)


def check(p: Problem, out: torch.Tensor, lse: torch.Tensor) -> None:
    want, want_lse = oracle(p)
    tolerance = TOLERANCE[p.q.dtype]
    torch.testing.assert_close(out.cpu().double(), want, atol=tolerance, rtol=tolerance)
    tolerance = LSE_TOLERANCE[p.q.dtype]
    torch.testing.assert_close(lse.cpu().double(), want_lse, atol=tolerance, rtol=tolerance)
    assert out.dtype == p.q.dtype
    assert out.stride() == p.q.stride()
    assert lse.dtype == torch.float32


CASES = [
    Case("d64", sq=128, sk=128),
    Case("ragged-63", sq=63, sk=63),
    Case("ragged-131", sq=131, sk=131, density=0.7),
    Case("more-keys", sq=70, sk=200, block_q=64, block_k=128),
    Case("more-queries", sq=200, sk=70, block_q=128, block_k=64),
    Case("d72-bf16", dim=72, dtype=torch.bfloat16),
    Case("d80", dim=80),
    Case("d96-fp16", dim=96, dtype=torch.float16, pooled=True),
    Case("d112", dim=112),
    Case("d128-bf16", dim=128, dtype=torch.bfloat16, order=True),
    Case("d256", dim=256, heads=1, list_shape=(1, 1)),
    Case("d40", dim=40),
    Case("batch-2-own-lists", batch=2, list_shape=(2, 2)),
    Case("batch-2-shared-lists", batch=2, list_shape=(1, 1), pooled=True, order=True),
    Case("batch-2-shared-heads", batch=2, list_shape=(2, 1), pooled=True),
    Case("mostly-empty-rows", sq=150, sk=150, density=0.15),
    Case("nothing", density=0.0),
    Case("nothing-but-pooled", density=0.0, pooled=True, sq=70, sk=140),
    Case("valid", valid=True, batch=2, list_shape=(1, 2)),
    Case("windows", windows=True, sq=130, sk=140, density=0.8),
    Case("windows-even", windows=True, sq=128, sk=128, density=0.8),
    Case("order", order=True, sq=131),
    Case(
        "pooled-many", pooled=True, sq=40, sk=16 * 67, block_q=64, block_k=16, density=0.2, heads=1, list_shape=(1, 1)
    ),
    Case("all", order=True, pooled=True, windows=True, valid=True, dim=72, sq=130, sk=140, density=0.7),
    Case("all-bf16", order=True, pooled=True, windows=True, valid=True, batch=2, dim=96, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle(case: Case, runner: tuple[str, str]) -> None:
    backend, device = runner
    p = make(case, device)
    out, lse = block_sparse_attention(p.q, p.k, p.v, p.lists, **p.extras(), return_lse=True, backend=backend)
    check(p, out, lse)
    if case.name in ("d64", "all"):
        alone = block_sparse_attention(p.q, p.k, p.v, p.lists, **p.extras(), backend=backend)
        torch.testing.assert_close(alone, out, rtol=0, atol=0)


BIG = [
    Case("1000", sq=1000, sk=1000, heads=3, list_shape=(1, 3), density=0.3, block_q=128, block_k=128),
    Case("4097", sq=4097, sk=1111, dim=128, density=0.3, block_q=128, block_k=64, pooled=True, order=True),
    Case(
        "1000-bf16", sq=1000, sk=4097, dim=128, density=0.2, block_q=128, block_k=128, dtype=torch.bfloat16, pooled=True
    ),
    Case(
        "1000-windows",
        sq=1000,
        sk=1000,
        dim=96,
        windows=True,
        valid=True,
        dtype=torch.float16,
        block_q=128,
        block_k=128,
    ),
]


@pytest.mark.parametrize("runner", [RUNNERS[1], RUNNERS[3]])
@pytest.mark.parametrize("case", BIG, ids=str)
def test_matches_oracle_at_size(case: Case, runner: tuple[str, str]) -> None:
    test_matches_oracle(case, runner)


@pytest.mark.parametrize("runner", RUNNERS)
def test_full_mask_is_dense_attention(runner: tuple[str, str]) -> None:
    backend, device = runner
    p = make(Case("full", sq=90, sk=130, density=1.1), device)
    got = block_sparse_attention(p.q, p.k, p.v, p.lists, backend=backend)
    want = F.scaled_dot_product_attention(p.q.double(), p.k.double(), p.v.double())
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("sk", [192, 170], ids=["even", "ragged"])
def test_skipped_blocks_are_never_read(runner: tuple[str, str], poison: float, sk: int) -> None:
    backend, device = runner
    p = make(Case("poison", sq=192, sk=sk, heads=1, list_shape=(1, 1)), device)
    p.levels = torch.tensor([[1, 0, 0], [1, 0, 1], [0, 0, 1]], dtype=torch.uint8)[None, None]
    p.lists = lists_from_levels(p.levels.to(device), 64, 64)
    want, want_lse = block_sparse_attention(p.q, p.k, p.v, p.lists, return_lse=True, backend=backend)
    check(p, want, want_lse)
    k, v = p.k.clone(), p.v.clone()
    k[:, :, 64:128] = poison
    v[:, :, 64:128] = poison
    got, got_lse = block_sparse_attention(p.q, k, v, p.lists, return_lse=True, backend=backend)
    assert torch.equal(got, want)
    assert torch.equal(got_lse, want_lse)
    k[:, :, :64] = poison  # visited by rows 0 and 1: row 2 must not notice
    v[:, :, :64] = poison
    got = block_sparse_attention(p.q, k, v, p.lists, backend=backend)
    assert torch.equal(got[:, :, 128:], want[:, :, 128:])


@pytest.mark.parametrize("runner", RUNNERS)
def test_any_strides(runner: tuple[str, str]) -> None:
    """A fused qkv projection: last dimension contiguous, everything else not, addresses not aligned to 16 bytes."""
    backend, device = runner
    case = Case("strides", batch=2, list_shape=(1, 2), dim=20)
    p = make(case, device)
    fused = torch.cat([p.q, p.k, p.v], -1).transpose(1, 2).contiguous()  # [B, S, H, 3 D]
    q, k, v = fused.transpose(1, 2).split(case.dim, -1)
    got = block_sparse_attention(q, k, v, p.lists, backend=backend)
    torch.testing.assert_close(got.cpu().double(), oracle(p)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("runner", RUNNERS)
def test_full_graph_compile(runner: tuple[str, str]) -> None:
    backend, device = runner
    p = make(Case("compile", pooled=True, order=True), device)

    def step(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        out, lse = block_sparse_attention(
            q * 2, k, p.v, p.lists, order=p.order, pooled=p.pooled, return_lse=True, backend=backend
        )
        return out.transpose(1, 2).reshape(1, 111, -1) + lse.mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(p.q, p.k), step(p.q, p.k), atol=1e-5, rtol=1e-5)


def test_float64_stays_float64() -> None:
    for backend in ("reference", "cpu"):
        p = make(Case("double", dtype=torch.float64, pooled=True), "cpu")
        out = block_sparse_attention(p.q, p.k, p.v, p.lists, pooled=p.pooled, backend=backend)
        torch.testing.assert_close(out, oracle(p)[0], atol=2e-7, rtol=2e-7)  # the bias is float32


def test_custom_op_is_sound() -> None:
    from dit_accel_kernels.block_sparse import _op

    p = make(Case("opcheck"), "cpu")
    n = p.lists
    args = (p.q, p.k, p.v, n.row_start, n.full, None, n.indices, 64, 64, 0.125, *[None] * 10, True, "cpu")
    torch.library.opcheck(_op, args, test_utils=("test_schema", "test_faketensor"))


def test_import_is_free_of_triton() -> None:
    code = "import sys, dit_accel_kernels.block_sparse; sys.exit('triton' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=False).returncode
        == 0
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": -1.0}, "scale must be positive, got -1.0"),
        ({"k": torch.zeros(1, 2, 111, 32)}, "agree in B, H and D"),
        ({"k": torch.zeros(1, 2, 111, 64).half()}, "torch.float32 on cpu like q, got torch.float16"),
        ({"q": torch.zeros(2, 111, 64)}, r"q must be \[B, H, S, D\]"),
        ({"q": torch.zeros(1, 2, 64, 111).mT}, "contiguous along D"),
        ({"key_valid": torch.ones(1, 110, dtype=torch.bool)}, r"key_valid must be torch.bool \[1, 111\]"),
        ({"order": TokenOrder(torch.zeros(1, 9).int(), torch.zeros(2).int())}, "order.table must be"),
        ({"backend": "cuda"}, "backend must be one of .*, got 'cuda'"),
    ],
)
def test_wrong_arguments_raise(change: dict[str, object], message: str) -> None:
    p = make(Case("errors"), "cpu")
    args: dict[str, object] = {"q": p.q, "k": p.k, "v": p.v, "lists": p.lists, **change}
    if "k" in change:
        args["v"] = change["k"]
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**args)  # type: ignore[arg-type]


def test_lists_must_fit() -> None:
    p = make(Case("errors"), "cpu")
    with pytest.raises(ValueError, match=r"lists.row_start must be torch.int32 \[1, 2\|1, 4\]"):
        block_sparse_attention(p.q, p.k, p.v, replace(p.lists, block_q=32))
    windows = make(Case("errors", windows=True), "cpu").windows
    with pytest.raises(ValueError, match="lists.partial is None"):
        block_sparse_attention(p.q, p.k, p.v, p.lists, windows=windows)


@pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize(
    "case",
    [
        Case("d64", sq=70, sk=97, pooled=True),
        Case("d72", dim=72, sq=70, sk=97, dtype=torch.bfloat16, windows=True),
        Case("d96", dim=96, sq=70, sk=128, dtype=torch.float16, batch=2, valid=True),
        Case("d128", dim=128, sq=70, sk=97, dtype=torch.bfloat16, order=True, pooled=True),
    ],
    ids=str,
)
def test_tiles_smaller_than_blocks(case: Case, tma: bool, device: str) -> None:
    """Both ways to load keys, with two tiles in each query block and four in each key block."""
    from dit_accel_kernels.block_sparse.configs import TileConfig
    from dit_accel_kernels.block_sparse.launch import block_sparse_triton, tma_reason

    p = make(case, device)
    arch = "interpreter"
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        arch = f"sm_{major}{minor}"
    if tma and (reason := tma_reason(p.k, p.v, arch)):
        pytest.skip(reason)
    config = TileConfig(32, 16, 4, 2, tma)
    out, lse = block_sparse_triton(p.q, p.k, p.v, p.lists, scale=case.dim**-0.5, **p.extras(), config=config)
    check(p, out, lse)


@pytest.mark.gpu
def test_addresses_beyond_32_bits() -> None:
    """More than 2**31 elements in q, k and v: 64 heads of 128 in a [B, S, H, D] view with a batch of 5."""
    shape = (5, 65536 + 40, 64, 128)
    if torch.cuda.mem_get_info()[0] < 5 * 2 * 5 * 65576 * 64 * 128:
        pytest.skip("needs 27 GB of GPU memory")
    q = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_().transpose(1, 2)
    levels = torch.zeros(1, 1, 513, 513, dtype=torch.uint8, device="cuda")
    levels[..., -1] = 1
    out = block_sparse_attention(q, q, q, lists_from_levels(levels, 128, 128, capacity=513), backend="triton")
    tail = q[-1:, -1:, -300:]
    want = F.scaled_dot_product_attention(tail, q[-1:, -1:, 65536:], q[-1:, -1:, 65536:])
    torch.testing.assert_close(out[-1:, -1:, -300:], want, atol=3e-2, rtol=3e-2)
