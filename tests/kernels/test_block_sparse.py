"""Block-sparse attention against a float64 oracle that knows nothing of lists, bits or blocks but the mask itself."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dit_accel_kernels.block_sparse import block_sparse_attention
from dit_accel_kernels.lists import lists_from_levels
from dit_accel_kernels.types import TokenOrder
from tests.kernels.problems import RUNNERS, Case, check, make, oracle

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
    args = (p.q, p.k, p.v, n.row_start, n.full, None, n.indices, 64, 64, 0.125, *[None] * 16, 0, True, "cpu")
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
