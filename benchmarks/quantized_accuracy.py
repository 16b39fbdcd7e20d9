"""What 8 and 4 bits cost on real attention inputs: the table of docs/quantized_notes.md.

    python benchmarks/quantized_accuracy.py --out quantized-accuracy     # 65 frames, on a GPU a minute or less
    python benchmarks/quantized_accuracy.py --toy                        # small, for a CPU

A video is generated with dense attention. At every n-th step each self-attention layer's queries, keys and values are
rounded to bfloat16, and dense attention (every block visited) is computed from them in each number format, with tokens as
the model has them and in the axis order that suits each head, with and without smoothing of the keys and rotation. All are
held against float32 attention on the same bfloat16 tensors. A head's order is the one with the smallest scales of its INT8
keys, so with the smallest steps. Without a GPU the kernels' rounding is computed in plain torch: that of queries, keys and
values, and that of the weights.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "kernels", "patches", "eval", "benchmarks")]

from _timing import environment  # noqa: E402

from dit_accel.demo.pipeline import load  # noqa: E402
from dit_accel_eval.files import write_json, write_text  # noqa: E402
from dit_accel_eval.generate import generate  # noqa: E402
from dit_accel_kernels import (  # noqa: E402
    BlockLists,
    TokenOrder,
    block_sparse_attention,
    lists_from_levels,
    permute_tokens,
    unpermute_tokens,
)
from dit_accel_kernels.quantize import PRECISIONS, Precision, quantize_qkv  # noqa: E402
from dit_accel_kernels.quantized import quantized_block_sparse_attention  # noqa: E402
from dit_accel_kernels.quantized.reference import dequantize  # noqa: E402

# A name, and a precision (None: the 16-bit kernel), each in natural order and in the heads' own.
VARIANTS: list[tuple[str, Precision | None]] = [
    ("bf16", None),
    *((name, p) for name, p in PRECISIONS.items() if name not in ("int4_fp8", "int4_int8")),  # near int4
    *((f"{name}, no smoothing", replace(PRECISIONS[name], smooth_k=False)) for name in ("int8", "int8_fp8", "fp8", "int4")),
    *((f"{name}, rotated", replace(PRECISIONS[name], rotate=True)) for name in ("int8", "int8_fp8", "fp8", "int4")),
    ("int4, rotated, no smoothing", Precision("int4", "bf16", smooth_k=False, rotate=True)),
]  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples/tiny_wan")
    parser.add_argument("--prompts", nargs="+", default=["octopus", "zebra"])
    parser.add_argument("--frames", type=int, default=65)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=6, help="measure at every n-th step, the first included")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--block", type=int, nargs=2, default=[64, 64], help="tokens in a query and a key block")
    parser.add_argument("--backend", help="of the 8-bit kernels (default: the first that works)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="one prompt, 9 frames of 64 pixels, 2 steps")
    names = [name for name, _ in VARIANTS]
    parser.add_argument("--only", nargs="+", default=names, choices=names, help="these variants (default: all)")
    parser.add_argument("--out", type=Path, help="write NAME.json and NAME.md")
    args = parser.parse_args()
    if args.toy:
        args.prompts, args.frames, args.size, args.steps, args.every = args.prompts[:1], 9, 64, 2, 1
    return args


@dataclass
class Errors:
    """Errors of one variant over all calls, one number each."""

    cosine: list[float] = field(default_factory=list)
    rel_l1: list[float] = field(default_factory=list)
    rel_rmse: list[float] = field(default_factory=list)

    def add(self, got: Tensor, want: Tensor) -> None:
        difference = got.float() - want
        numbers = torch.stack(
            [
                F.cosine_similarity(got.float().flatten(), want.flatten(), dim=0),
                difference.abs().sum() / want.abs().sum(),
                difference.norm() / want.norm(),
            ]
        ).tolist()
        for kept, number in zip((self.cosine, self.rel_l1, self.rel_rmse), numbers):
            kept.append(number)

    def summary(self) -> dict[str, float]:
        def mean(numbers: list[float]) -> float:
            return sum(numbers) / len(numbers)

        return {
            "cosine": mean(self.cosine),
            "worst_cosine": min(self.cosine),
            "rel_l1": mean(self.rel_l1),
            "worst_rel_l1": max(self.rel_l1),
            "rel_rmse": mean(self.rel_rmse),
            "calls": len(self.cosine),
        }


def axis_orders(grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """int32 ``[6, S]``: the tokens of a grid with its axes in each order, the natural one first."""
    places = torch.arange(math.prod(grid), device=device, dtype=torch.int32).view(grid)
    return torch.stack([places.permute(p).flatten() for p in itertools.permutations(range(3))]).contiguous()


def best_order(k: Tensor, grid: tuple[int, int, int], block: int) -> TokenOrder:
    """The order of each head with the smallest sum of squared scales of its smoothed INT8 keys."""
    table = axis_orders(grid, k.device)
    heads = torch.zeros(k.shape[1], dtype=torch.int32, device=k.device)
    cost = []
    for i in range(len(table)):
        order = TokenOrder(table, heads + i)
        made = quantize_qkv(k, k, k, "int8", block_k=block, order=order, keys_ordered=False)
        cost.append(made.k_scale.square().sum((0, 2)))
    return TokenOrder(table, torch.stack(cost).argmin(0).int())


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """float32 attention, a head at a time, without TF32."""
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            x, y, z = (t[b, h].float() for t in (q, k, v))
            out[b, h] = torch.softmax((x @ y.T) * q.shape[-1] ** -0.5, -1) @ z
    return out


def rounded(q: Tensor, k: Tensor, v: Tensor, kind: str, tile: int) -> Tensor:
    """Dense attention of float32 ``[B, H, S, D]`` with weights as the kernels round them, a head at a time, as bfloat16.

    Args:
        q: queries, as their codes have them.
        k: keys, as their codes have them.
        v: values, as their codes have them.
        kind: number format of the weights, ``"bf16"``, ``"fp8"`` or ``"int8"``.
        tile: keys whose INT8 weights have one factor.
    """
    out = torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            logits = (q[b, h] @ k[b, h].T) * q.shape[-1] ** -0.5
            weights = torch.exp(logits - logits.amax(-1, keepdim=True))
            total = weights.sum(-1, keepdim=True)
            if kind == "bf16":
                weights = weights.bfloat16().float()
            elif kind == "fp8":
                weights = (weights * 256).to(torch.float8_e4m3fn).float() / 256
            else:
                parts = []
                for part in weights.split(tile, -1):
                    top = part.amax(-1, keepdim=True).clamp(min=1e-30)
                    parts.append((part / top * 127).round() * (top / 127))
                weights = torch.cat(parts, -1)
                total = weights.sum(-1, keepdim=True)
            out[b, h] = ((weights @ v[b, h]) / total).bfloat16()
    return out


@dataclass
class Study:
    """Measures attention calls of one pipeline."""

    grid: tuple[int, int, int]
    block: tuple[int, int]
    backend: str | None
    layers: int
    every: int
    variants: list[tuple[str, Precision | None]]
    calls: int = 0
    measured: int = 0
    errors: dict[tuple[str, str], Errors] = field(default_factory=dict)

    def due(self) -> bool:
        """Whether the call that begins now belongs to a step that is measured; counts it."""
        step = self.calls // self.layers
        self.calls += 1
        return step % self.every == 0

    def measure(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        q, k, v = (x.bfloat16().contiguous() for x in (q, k, v))
        want = exact(q, k, v)
        count = [-(-q.shape[2] // size) for size in self.block]
        lists = lists_from_levels(torch.ones(1, 1, *count, dtype=torch.uint8, device=q.device), *self.block)
        self.measured += 1
        for where, order in (("natural", None), ("reordered", best_order(k, self.grid, self.block[1]))):
            for name, precision in self.variants:
                out = self.attend(q, k, v, lists, precision, order)
                self.errors.setdefault((name, where), Errors()).add(out, want)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, precision: Precision | None, order: TokenOrder | None
    ) -> Tensor:
        if precision is None and q.device.type == "cpu":
            return rounded(q.float(), k.float(), v.float(), "bf16", lists.block_k)  # whatever the order
        found: Tensor | tuple[Tensor, Tensor]
        if precision is None:
            if order is not None:
                k, v = permute_tokens(k, order), permute_tokens(v, order)
            found = block_sparse_attention(q, k, v, lists, order=order)
        else:
            made = quantize_qkv(q, k, v, precision, block_k=lists.block_k, order=order, keys_ordered=order is None)
            if q.device.type == "cpu" and self.backend is None:
                out = rounded(*dequantize(made, q.shape[3]), precision.pv, lists.block_k)
                return out if order is None else unpermute_tokens(out, order)
            found = quantized_block_sparse_attention(
                q, k, v, lists, precision=precision, order=order, prepared=made, backend=self.backend
            )
        assert isinstance(found, Tensor)
        return found


@contextmanager
def watching(study: Study) -> Iterator[None]:
    """Within the block, self-attention of this process is measured as it is computed."""
    original: Callable[..., Tensor] = F.scaled_dot_product_attention
    inside = False

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal inside
        visual = query.shape == key.shape and query.shape[2] == math.prod(study.grid)
        if visual and not inside and study.due():
            inside = True
            try:
                study.measure(query, key, value)
            finally:
                inside = False
        return original(query, key, value, *args, **kwargs)

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def token_grid(pipe: Any, frames: int, size: int) -> tuple[int, int, int]:
    patch = pipe.transformer.config.patch_size
    side = size // pipe.vae_scale_factor_spatial
    return (((frames - 1) // pipe.vae_scale_factor_temporal + 1) // patch[0], side // patch[1], side // patch[2])


def table(study: Study) -> str:
    """Markdown: a line for each variant, natural and reordered side by side."""
    lines = [
        "| variant | cosine | worst | rel-L1 | worst | rel-RMSE | reordered: cosine | rel-L1 | worst | rel-RMSE |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, _ in study.variants:
        a, b = (study.errors[name, where].summary() for where in ("natural", "reordered"))
        lines.append(
            f"| {name} | {a['cosine']:.5f} | {a['worst_cosine']:.5f} | {a['rel_l1']:.2%} | {a['worst_rel_l1']:.2%} "
            f"| {a['rel_rmse']:.2%} | {b['cosine']:.5f} | {b['rel_l1']:.2%} | {b['worst_rel_l1']:.2%} "
            f"| {b['rel_rmse']:.2%} |"
        )
    return "\n".join(lines) + "\n"


@torch.no_grad()
def main() -> None:
    args = arguments()
    torch.backends.cuda.matmul.allow_tf32 = False
    pipe = load(args.model, torch.device(args.device))
    grid = token_grid(pipe, args.frames, args.size)
    layers = pipe.transformer.config.num_layers
    # With guidance the transformer runs twice a step, and a step's calls are those of both.
    chosen = [(name, precision) for name, precision in VARIANTS if name in args.only]
    study = Study(grid, tuple(args.block), args.backend, 2 * layers, args.every, chosen)
    began = time.perf_counter()
    options = {"height": args.size, "width": args.size, "num_frames": args.frames}
    for number, prompt in enumerate(args.prompts):
        with watching(study):
            generate(
                pipe, [prompt], [number], decode=False, num_inference_steps=args.steps, guidance_scale=4.0, **options
            )
        if not study.measured:
            raise SystemExit("no self-attention call was seen: does the pipeline call scaled_dot_product_attention?")
        text = table(study)
        print(text, end="")
        print(f"{study.measured} calls of {grid} tokens, {time.perf_counter() - began:.0f} s", flush=True)
        if args.out is not None:  # what there is after each prompt
            errors = [{"variant": n, "order": w, **e.summary()} for (n, w), e in study.errors.items()]
            made = {"environment": environment(torch.device(args.device)), "grid": grid, "block": args.block}
            made |= {"frames": args.frames, "steps": args.steps, "every": args.every}
            made["prompts"] = args.prompts[: number + 1]
            write_json(args.out.with_suffix(".json"), {**made, "errors": errors})
            write_text(args.out.with_suffix(".md"), text)


if __name__ == "__main__":
    main()
