"""The quantiser: what codes and scales promise, and the Triton kernels against the reference bit for bit."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from dit_accel_kernels import TokenOrder, permute_tokens
from dit_accel_kernels.quantize import (
    PRECISIONS,
    Precision,
    QuantizedQKV,
    hadamard,
    hadamard_size,
    operand_order,
    pack_int4,
    quantize_qkv,
    resolve_precision,
    to_operand_order,
    unpack_int4,
)
from dit_accel_kernels.quantize.formats import _gpu_reason
from dit_accel_kernels.quantize.sample import sample_of
from dit_accel_kernels.quantized.reference import dequantize
from tests.kernels.interpreter import repair

repair()

TWINS = [
    pytest.param("cpu", id="interpreter", marks=pytest.mark.interpreter),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
]


def draw(tokens: int = 150, dim: int = 64, dtype: torch.dtype = torch.bfloat16, batch: int = 2) -> list[Tensor]:
    """q, k, v as models hand them over; keys have a mean."""
    q, k, v = (torch.randn(batch, tokens, 2, dim).to(dtype).transpose(1, 2) for _ in range(3))
    return [q, k + 2 * torch.randn(1, 2, 1, dim).to(dtype), v]


def draw_order(tokens: int) -> TokenOrder:
    return TokenOrder(torch.stack([torch.randperm(tokens) for _ in range(3)]).int(), torch.tensor([2, 0]).int())


def bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_same(a: QuantizedQKV, b: QuantizedQKV) -> None:
    for field in fields(QuantizedQKV):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, Tensor):
            assert x.dtype == y.dtype, field.name
            if field.name != "v" or a.precision.pv != "bf16":
                assert x.is_contiguous(), field.name
                assert y.is_contiguous(), field.name
            assert torch.equal(bits(x.cpu().contiguous()), bits(y.cpu().contiguous())), field.name
        else:
            assert x == y, field.name


def test_int4_round_trip() -> None:
    codes = torch.randint(-8, 8, (2, 3, 5, 72), dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.shape == (2, 3, 5, 36)
    assert torch.equal(unpack_int4(packed), codes)
    assert packed[0, 0, 0, 0].item() == (codes[0, 0, 0, 0].item() & 15) + 16 * (codes[0, 0, 0, 36].item() & 15)


def test_int4_takes_only_what_fits() -> None:
    with pytest.raises(ValueError, match="must be int8"):
        pack_int4(torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="even D"):
        pack_int4(torch.zeros(3, dtype=torch.int8))
    with pytest.raises(ValueError, match="must be uint8"):
        unpack_int4(torch.zeros(3, dtype=torch.int8))


def test_operand_order() -> None:
    for t in range(4):
        for b in range(2):
            for e in range(2):
                assert operand_order()[4 * t + 2 * b + e] == 8 * b + 2 * t + e
    x = torch.arange(48).view(1, 48)
    want = [16 * g + key for g in range(3) for key in operand_order()]
    assert to_operand_order(x)[0].tolist() == want


@pytest.mark.parametrize(("dim", "size"), [(64, 64), (128, 128), (256, 128), (72, 8), (96, 32)])
def test_hadamard_is_a_rotation(dim: int, size: int) -> None:
    assert hadamard_size(dim) == size
    matrix = hadamard(torch.eye(dim), size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim), rtol=0, atol=1e-6)
    torch.testing.assert_close(matrix.abs()[:size, :size], torch.full((size, size), size**-0.5))
    assert not matrix[:size, size:].any()
    q, k = torch.randn(5, dim), torch.randn(7, dim)
    torch.testing.assert_close(hadamard(q, size) @ hadamard(k, size).T, q @ k.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["int8_fp8", "int4_int8", "fp8"])
@pytest.mark.parametrize("dim", [64, 72])
def test_codes_are_within_half_a_step(name: str, dim: int) -> None:
    q, k, v = draw(dim=dim, dtype=torch.float32)
    made = quantize_qkv(q, k, v, name, block_k=64, backend="reference")
    assert made.k_mean is not None
    torch.testing.assert_close(made.k_mean, k.double().mean(2).float())
    got_q, got_k, got_v = dequantize(made, dim)
    want_k = k - made.k_mean[:, :, None]
    k_scale = made.k_scale.repeat_interleave(64, -1)[:, :, : k.shape[2], None]
    for kind, got, want, scale in (
        (made.precision.qk, got_q, q, made.q_scale[..., None]),
        (made.precision.qk, got_k, want_k, k_scale),
        (made.precision.pv, got_v, v, made.v_scale[:, :, None, :dim]),
    ):
        # Three bits after the leading one, and steps of 2**-9 below 2**-6.
        allowed = torch.maximum(want.abs() * 2.0**-4, scale * 2.0**-10) if kind == "fp8" else scale * 0.5
        assert ((got - want).abs() <= allowed * 1.0001).all()


def test_scales_are_of_tokens_blocks_and_channels() -> None:
    q, k, v = draw(dtype=torch.float32)
    made = quantize_qkv(q, k, v, Precision("int8", "int8", smooth_k=False), block_k=64, backend="reference")
    torch.testing.assert_close(made.q_scale, q.abs().amax(-1) / 127)
    for j in range(3):
        torch.testing.assert_close(made.k_scale[:, :, j], k[:, :, 64 * j : 64 * j + 64].abs().amax((2, 3)) / 127)
    torch.testing.assert_close(made.v_scale, v.abs().amax(2) / 127)
    assert made.k_mean is None
    assert made.v.shape == (2, 2, 64, 256)
    assert not made.v[..., 160:].any()  # groups of 16 with a key are up to 160


@pytest.mark.parametrize("rotate", [False, True])
def test_zero_and_constant_blocks(rotate: bool) -> None:
    q, k, v = draw(tokens=128)
    q[:, :, 3], k[:, :, :64], v[..., 5] = 0, 0, 0
    k[:, :, 64:] = 3
    made = quantize_qkv(
        q, k, v, Precision("int8", "fp8", smooth_k=False, rotate=rotate), block_k=64, backend="reference"
    )
    assert not made.q[:, :, 3].any()
    assert (made.q_scale[:, :, 3] == 1).all()
    assert (made.k_scale[:, :, 0] == 1).all()
    assert (made.v_scale[:, :, 5] == 1).all()
    got_q, got_k, got_v = dequantize(made, 64)
    assert not got_k[:, :, :64].any()
    assert not got_v[..., 5].any()
    want = hadamard(k.float(), 64) if rotate else k.float()
    torch.testing.assert_close(got_k[:, :, 64:], want[:, :, 64:])
    smooth = quantize_qkv(q, torch.full_like(k, 3), v, "int8", block_k=64, backend="reference")
    assert not smooth.k.any()
    assert got_q.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("precision", [Precision("int8", "fp8"), Precision("fp8", "int8", rotate=True)])
def test_what_is_not_finite_stays_in_its_token(bad: float, precision: Precision) -> None:
    q, k, v = draw(tokens=128)
    clean = [x.clone() for x in (q, k, v)]
    for x, hurt in zip(clean, (q, k, v)):
        x[0, 0, 7, 3] = 0
        hurt[0, 0, 7, 3] = bad
    got = quantize_qkv(q, k, v, precision, block_k=64, backend="reference")
    want = quantize_qkv(*clean, precision, block_k=64, backend="reference")
    names = ("q", "q_scale", "v", "v_scale", "k_mean")
    for name in names:
        assert torch.equal(bits(getattr(got, name)), bits(getattr(want, name))), name
    others = torch.arange(128) != 7
    _, got_k, _ = dequantize(got, 64)
    exact = clean[1].float() - want.k_mean[:, :, None]
    if precision.rotate:
        exact = hadamard(exact, 64)
    assert got_k.isfinite().all()
    assert (got_k - exact)[:, :, others].abs().max() < 0.04 * exact.abs().max()


def test_invalid_keys_count_nothing() -> None:
    q, k, v = draw()
    valid = torch.rand(2, 150) < 0.7
    valid[1, 64:128] = False
    hurt_k, hurt_v = (x.masked_fill(~valid[:, None, :, None], float("nan")) for x in (k, v))
    zero_v = v.masked_fill(~valid[:, None, :, None], 0)
    got = quantize_qkv(q, hurt_k, hurt_v, "fp8", block_k=64, key_valid=valid, backend="reference")
    want = quantize_qkv(q, k * 1, zero_v, "fp8", block_k=64, key_valid=valid, backend="reference")
    assert_same(got, want)
    assert not got.k.float()[~valid[:, None].expand(2, 2, 150)].any()
    assert (got.k_scale[1, :, 1] == 1).all()
    mean = torch.stack([k[b][:, valid[b]].double().mean(1) for b in range(2)]).float()
    torch.testing.assert_close(got.k_mean, mean)


@pytest.mark.parametrize("precision", ["int8", "int8_fp8", "int4_int8"])
def test_moves_tokens_in_the_same_pass(precision: str) -> None:
    q, k, v = draw()
    order, key_order = draw_order(150), draw_order(150)
    valid = torch.rand(2, 150) < 0.7
    options = {"block_k": 64, "key_valid": valid, "backend": "reference"}
    want = quantize_qkv(
        permute_tokens(q, order), permute_tokens(k, key_order), permute_tokens(v, key_order), precision, **options
    )
    got = quantize_qkv(q, k, v, precision, order=order, key_order=key_order, keys_ordered=False, **options)
    assert_same(got, want)
    ordered = quantize_qkv(q, permute_tokens(k, order), permute_tokens(v, order), precision, order=order, **options)
    assert_same(quantize_qkv(q, k, v, precision, order=order, keys_ordered=False, **options), ordered)


@pytest.mark.parametrize("device", TWINS)
@pytest.mark.parametrize(
    ("precision", "dim", "dtype", "ordered", "masked", "block"),
    [
        (Precision("int8", "bf16"), 64, torch.bfloat16, False, False, 64),
        (Precision("int8", "fp8", rotate=True), 64, torch.bfloat16, True, True, 64),
        (Precision("int4", "bf16", rotate=True), 72, torch.float16, True, False, 32),
        (Precision("fp8", "fp8", smooth_k=False), 128, torch.bfloat16, False, True, 128),
        (Precision("int8", "int8"), 96, torch.float32, True, True, 24),
    ],
    ids=str,
)
def test_triton_has_the_bits_of_the_reference(
    precision: Precision, dim: int, dtype: torch.dtype, ordered: bool, masked: bool, block: int, device: str
) -> None:
    tokens = 150 if device == "cpu" else 1111
    q, k, v = draw(tokens, dim, dtype)
    q[0, 0, 3], k[:, 1, 24:56], v[0, 0, :, 5] = 0, k[:, 1, 24:25], 0
    q[1, 1, 4, 2], k[0, 0, 5, 3], k[1, 0, 9, 0], v[1, 0, 7, 7] = [float(x) for x in ("inf", "nan", "-inf", "nan")]
    if precision.pv == "bf16":
        v = torch.zeros_like(v)  # passed on as it is, NaN and all
    order, valid = draw_order(tokens) if ordered else None, torch.rand(2, tokens) < 0.7 if masked else None
    want = quantize_qkv(
        *(q, k, v, precision),
        block_k=block,
        order=order,
        keys_ordered=not ordered,
        key_valid=valid,
        backend="reference",
    )
    there = None if order is None else TokenOrder(order.table.to(device), order.head.to(device))
    got = quantize_qkv(
        *(x.to(device) for x in (q, k, v)),
        precision,
        block_k=block,
        order=there,
        keys_ordered=not ordered,
        key_valid=None if valid is None else valid.to(device),
        backend="triton",
    )
    assert_same(got, want)


def test_samples() -> None:
    assert sample_of(2047).step == 1
    assert sample_of(2047).headroom == 1
    for tokens in (2048, 4608, 8448, 32768, 75600, 1 << 20):
        sample = sample_of(tokens)
        assert sample.step % 2 == 1
        assert (sample.count - 1) * sample.step < tokens <= sample.count * sample.step
        assert 683 <= sample.count <= 2047
    assert sample_of(75600, every=True).count == 75600


@pytest.mark.parametrize("device", TWINS)
@pytest.mark.parametrize(("ordered", "masked"), [(False, False), (True, True)])
@pytest.mark.parametrize("precision", ["int8_fp8", "int8_int8"])
def test_samples_and_what_is_above_them(
    precision: str, ordered: bool, masked: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One channel of one head holds a value that no sample sees, another only zeros but for one."""
    if device == "cpu":
        monkeypatch.setattr("dit_accel_kernels.quantize.sample._MANY", 64)
    tokens = 150 if device == "cpu" else 9000
    assert sample_of(tokens).step in (5, 9)
    q, k, v = draw(tokens)
    place = torch.arange(tokens) if not ordered else draw_order(tokens).table[0].long()
    order = TokenOrder(place.int()[None], torch.zeros(2).int()) if ordered else None
    v[0, 1, place[7], 3], v[:, :, :, 9], v[1, 0, place[23], 9] = 300.0, 0.0, 1e-6
    valid = torch.arange(tokens) % 4 != 2
    options = {
        "block_k": 64, "keys_ordered": not ordered, "order": order, "key_valid": valid.expand(2, -1) if masked else None,
    }  # fmt: skip
    want = quantize_qkv(q, k, v, precision, backend="reference", **options)
    moved = v if order is None else v[:, :, place]
    real = moved.float() * valid[:, None] if masked else moved.float()
    _, _, got_v = dequantize(want, 64)
    step = want.v_scale[:, :, None] * (0.5 if precision == "int8_int8" else 2.0**-10)
    allowed = step if precision == "int8_int8" else torch.maximum(real.abs() * 2.0**-4, step)
    assert ((got_v - real).abs() <= allowed * 1.0001).all()
    there = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    if order is not None:
        there["order"] = TokenOrder(order.table.to(device), order.head.to(device))
    got = quantize_qkv(*(x.to(device) for x in (q, k, v)), precision, backend="triton", **there)
    assert_same(got, want)


@pytest.mark.parametrize("precision", [PRECISIONS["int8"], PRECISIONS["int4_fp8"]], ids=str)
def test_full_graph_compile(precision: Precision) -> None:
    q, k, v = draw()
    order = draw_order(150)

    def run(q: Tensor, k: Tensor, v: Tensor, keys_ordered: bool) -> list[Tensor]:
        made = quantize_qkv(q, k, v, precision, block_k=64, order=order, keys_ordered=keys_ordered, backend="reference")
        return [made.q, made.q_scale, made.k, made.k_scale, made.v, made.v_scale]

    for keys_ordered in (True, False):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for got, want in zip(compiled(q, k, v, keys_ordered), run(q, k, v, keys_ordered)):
            assert torch.equal(bits(got), bits(want))


def test_custom_op_is_sound() -> None:
    q, k, v = draw()
    order = draw_order(150)
    flags = ("int8", "fp8", True, True, 64)
    for tables in ((None,) * 4, (order.table, order.head) * 2):
        torch.library.opcheck(
            torch.ops.dit_accel_kernels.quantize_qkv.default, (q, k, v, *flags, *tables, None, "reference")
        )


def test_wrong_arguments_raise() -> None:
    q, k, v = draw()
    order = draw_order(140)
    with pytest.raises(ValueError, match="precision must be"):
        quantize_qkv(q, k, v, "int5", block_k=64)
    with pytest.raises(ValueError, match="qk must be"):
        Precision("bf16", "bf16")
    with pytest.raises(ValueError, match="pv must be"):
        Precision("int8", "int4")
    with pytest.raises(ValueError, match="order must hold 150 tokens"):
        quantize_qkv(q, k, v, "int8", block_k=64, order=order)
    with pytest.raises(ValueError, match="key_valid must be"):
        quantize_qkv(q, k, v, "int8", block_k=64, key_valid=torch.ones(1, 150, dtype=torch.bool))
    with pytest.raises(ValueError, match="must agree"):
        quantize_qkv(q, k, v[:, :, 1:], "int8", block_k=64)
    with pytest.raises(ValueError, match="at least one token"):
        quantize_qkv(q, k, v, "int8", block_k=0)
    with pytest.raises(ValueError, match="floating-point"):
        quantize_qkv(q, k.int(), v, "int8", block_k=64)
    assert resolve_precision("int8") == replace(PRECISIONS["int8"])


@pytest.mark.parametrize(("capability", "refused"), [((8, 0), True), ((8, 6), True), ((8, 9), False), ((9, 0), False)])
def test_fp8_needs_hardware(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], refused: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    reason = _gpu_reason.__wrapped__(torch.device("cuda"))
    assert (reason is not None) == refused
    if reason is not None:
        assert f"got {capability[0]}.{capability[1]}" in reason
