"""Our ComfyUI override beside comfy-kitchen's ``sol_attn``, the kernel of ComfyUI's own sparse attention node.

``PYTHONPATH=.:kernels:patches python benchmarks/comfyui_attention.py`` takes some minutes on one H100 or H200:
self-attention of Wan 14B at 720p (grid 21x45x80, 75,600 tokens, 40 heads of 128, bf16) at densities 0.1 and 0.2, through
the override as ComfyUI's Wan calls it, and the peer's top-k selection with the same share of exact blocks. On a CPU a toy
size runs and the peer is skipped.

Queries and keys are made with structure, since random ones have none to find. Each head has lengths of its own along
frames, rows and columns; a token's key is made of random Fourier features of its place at those lengths (so that
neighbours are alike), of the vector of the object that covers it (each token belongs to the nearest of 24 random places),
and of noise. Its query is the same mixture with other noise. Values are smooth over the grid with noise added. The gain
sets how peaked the softmax is; the share of softmax mass in the heaviest tenth of the 64-token blocks is printed.

Errors are ``|out - ref| / |ref|`` over sampled query rows of all heads against float32 attention over all keys.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from _timing import environment, measure
from torch import Tensor, nn

from dit_accel_patches.comfyui.override import FORWARD, OVERRIDE
from dit_accel_patches.comfyui.patching import accelerate, session_of
from dit_accel_patches.comfyui.settings import Settings

BAR = 2.2
STEPS = 10


@dataclass(frozen=True)
class Row:
    """One measurement."""

    what: str
    density: float
    exact_share: float
    ms: float
    error: float
    backend: str


class WanModel(nn.Module):
    """Stands for ComfyUI's class of this name: the override reads its patch size and number of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_size = (1, 2, 2)
        self.blocks = nn.ModuleList([nn.Identity()])

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return x


class Patcher:
    """As much of ComfyUI's model patcher as the node uses."""

    def __init__(self) -> None:
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Any]]] = {}
        self.callbacks: dict[str, dict[str, list[Any]]] = {}
        self.model = WanModel()

    def clone(self) -> Patcher:
        return copy.copy(self)

    def get_model_object(self, name: str) -> Any:
        sampling = SimpleNamespace(percent_to_sigma=lambda percent: 1.0 - percent)
        return {"diffusion_model": self.model, "model_sampling": sampling}[name]

    def add_wrapper_with_key(self, kind: str, key: str, value: Any) -> None:
        self.wrappers[kind] = {key: [value]}

    def add_callback_with_key(self, kind: str, key: str, value: Any) -> None:
        self.callbacks[kind] = {key: [value]}


def dense(q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Tensor:
    """Dense attention ``[B, S, H D]`` in ComfyUI's form."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def structured(
    grid: tuple[int, int, int], heads: int, dim: int, gain: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v ``[1, S, H D]`` as the module's text says."""
    gen = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, device=device)

    axes = [torch.arange(size, device=device, dtype=torch.float32) for size in grid]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    seeds = torch.rand(24, 3, generator=gen, device=device) * torch.tensor(grid, device=device)
    owner = torch.cdist(place / torch.tensor(grid, device=device), seeds / torch.tensor(grid, device=device)).argmin(1)
    made: list[list[Tensor]] = [[], [], []]
    for _ in range(heads):
        lengths = torch.tensor(grid, device=device) * (0.05 + 0.6 * torch.rand(3, generator=gen, device=device))
        phase = (place / lengths) @ normal(3, dim // 2)
        field = torch.cat((phase.cos(), phase.sin()), 1)
        objects = normal(24, dim)[owner]
        common = gain * (field + 0.35 * objects)
        smooth = torch.sin((place / torch.tensor(grid, device=device)) @ normal(3, dim) * 4)
        made[0].append(common + 0.3 * gain * normal(len(place), dim))
        made[1].append(common + 0.3 * gain * normal(len(place), dim))
        made[2].append(smooth + 0.3 * normal(len(place), dim))
    return tuple(torch.cat([x.to(dtype) for x in parts], 1)[None] for parts in made)  # type: ignore[return-value]


def reference(q: Tensor, k: Tensor, v: Tensor, heads: int, rows: Tensor) -> tuple[Tensor, float]:
    """Float32 attention of sampled rows ``[R, H D]``, and the mass in the heaviest tenth of the 64-token blocks."""
    outs, masses = [], []
    size = q.shape[-1] // heads
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[0, rows, part].float() @ k[0, :, part].float().T * size**-0.5
        p = scores.softmax(-1)
        outs.append(p @ v[0, :, part].float())
        blocks = F.pad(p, (0, -p.shape[1] % 64)).unflatten(1, (-1, 64)).sum(-1)
        top = blocks.topk(max(1, math.ceil(0.1 * blocks.shape[1])), -1).values
        masses.append(top.sum(-1).mean())
    return torch.cat(outs, 1), torch.stack(masses).mean().item()


def distance(out: Tensor, ref: Tensor, rows: Tensor) -> float:
    """Relative error of the sampled rows of ``out [1, S, H D]``."""
    return ((out[0, rows].float() - ref).norm() / ref.norm()).item()


class Ours:
    """The override in a run of ``STEPS`` steps."""

    def __init__(
        self, grid: tuple[int, int, int], heads: int, density: float, method: str = "auto", start: float = 0.2
    ) -> None:
        settings = Settings(method=method, quality="custom", density=density, min_tokens=0, start_percent=start)
        self.patcher = accelerate(Patcher(), settings)
        self.heads = heads
        self.sigmas = torch.linspace(1, 0, STEPS + 1)
        self.latent = torch.empty(1, 16, grid[0], grid[1] * 2, grid[2] * 2, device="meta")

    def options(self, step: int) -> dict[str, Any]:
        """What ComfyUI's sampler says at a step."""
        made = {
            "sample_sigmas": self.sigmas,
            "sigmas": self.sigmas[step : step + 1],
            "uuids": ["prompt"],
            "block_index": 0,
            **self.patcher.model_options["transformer_options"],
        }
        made[FORWARD] = session_of(self.patcher).begin_forward(self.patcher.model, (self.latent,), {}, made)
        return made

    def call(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """One self-attention of Wan."""
        options[FORWARD].numbering._seen.clear()  # the benchmark repeats one block
        return options[OVERRIDE](dense, q, k, v, heads=self.heads, transformer_options=options)  # type: ignore[no-any-return]


def gate(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    """Everything computed exactly must agree with the reference before anything is timed."""
    grid, heads = (3, 18, 22), 2
    q, k, v = structured(grid, heads, dim, 1.0, device, dtype)
    rows = torch.arange(0, q.shape[1], 7, device=device)
    ref, _ = reference(q, k, v, heads, rows)
    ours = Ours(grid, heads, 1.0)
    for step in range(3):
        out = ours.call(q, k, v, ours.options(step))
        error = distance(out, ref, rows)
        limit = 1e-2 if dtype == torch.bfloat16 else 1e-4
        if not error < limit:
            return f"step {step}: relative error {error:.2e} at density 1, expected below {limit:g}"
    (status,) = session_of(ours.patcher).status()
    return None if status.sparse_calls == 1 else f"nothing was sparse: {status.reasons}"


def peer(device: torch.device, dim: int) -> tuple[Callable[..., Tensor] | None, str]:
    """comfy-kitchen's ``sol_attn``, or why it cannot run here."""
    try:
        import comfy_kitchen
    except ImportError as error:
        return None, f"comfy-kitchen is not installed ({error})"
    if not comfy_kitchen.sol_attn_is_available(device):
        return None, f"no compiled sol_attn kernel for {device}"
    if dim != 128:
        return None, f"sol_attn takes heads of 128, got {dim}"
    return comfy_kitchen.sol_attn, ""


def bench(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """All rows, printed as they come."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    grid, heads = tuple(args.grid), args.heads
    q, k, v = structured(grid, heads, args.dim, args.gain, device, dtype)
    tokens = q.shape[1]
    rows = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))[: args.rows].to(device)
    ref, mass = reference(q, k, v, heads, rows)
    say(
        f"grid {grid}, {tokens} tokens, {heads} heads of {args.dim}, {dtype}; heaviest tenth of blocks: {mass:.3f} of mass"
    )
    found: list[Row] = []

    def add(what: str, density: float, share: float, backend: str, call: Callable[[], Tensor]) -> None:
        error = distance(call(), ref, rows)
        row = Row(what, density, share, measure(call, device, args.budget).p50_ms, error, backend)
        found.append(row)
        say(f"{what:<28} density {density:<5g} exact {share:.4f} {row.ms:>10.3f} ms  error {error:.5f}  {backend}")

    add("dense SDPA", 1.0, 1.0, "torch", lambda: dense(q, k, v, heads))
    sol, reason = peer(device, args.dim)
    if sol is None:
        say(f"sol_attn skipped: {reason}")
    for density in args.densities:
        ours = Ours(grid, heads, density, args.method)
        for step in range(3):
            ours.call(q, k, v, ours.options(step))  # the warm-up and the plan, on its last step or the one behind it
        options = ours.options(3)
        ours.call(q, k, v, options)
        (status,) = session_of(ours.patcher).status()
        share, backend = status.sparse_density, status.backend
        add("ours, through the override", density, share, backend, lambda o=ours, at=options: o.call(q, k, v, at))
        if sol is not None:
            blocks = -(-tokens // 64)
            split = [x.unflatten(-1, (heads, -1)) for x in (q, k, v)]
            ratio = max(share - 3 / blocks, 1 / blocks)  # the diagonal and its neighbours come on top of the top-k
            for extra in (0, 256):
                add(
                    f"sol_attn, extra tokens {extra}",
                    density,
                    share,
                    "comfy-kitchen",
                    lambda r=ratio, e=extra, qkv=split: sol(*qkv, topk_ratio=r, token_aug=e).flatten(2),
                )
    return found


def verdict(found: list[Row]) -> bool:
    """Ratios of time and error at each density; whether the bar is met wherever the peer ran."""
    met = True
    for row in found:
        peers = [p for p in found if p.backend == "comfy-kitchen" and p.density == row.density]
        if not row.what.startswith("ours"):
            continue
        say(f"density {row.density:g}: {found[0].ms / row.ms:.2f} x dense SDPA, error {row.error:.5f}")
        for p in peers:
            ratio, closer = p.ms / row.ms, row.error < p.error
            met &= ratio >= BAR and closer
            say(f"  {ratio:.2f} x {p.what} (bar {BAR}), error {row.error:.5f} against {p.error:.5f}")
    return met


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    """Gate, measure, compare; 1 if the gate or the bar is missed."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--grid", type=int, nargs=3, default=(21, 45, 80) if gpu else (4, 16, 16))
    parser.add_argument("--heads", type=int, default=40 if gpu else 2)
    parser.add_argument("--method", default="auto", help="of the node")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--gain", type=float, default=1.0, help="how peaked the softmax is")
    parser.add_argument("--densities", type=float, nargs="*", default=(0.1, 0.2))
    parser.add_argument("--rows", type=int, default=512, help="query rows compared with float32")
    parser.add_argument("--budget", type=float, default=2.0 if gpu else 0.2, help="seconds of timing per row")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if gpu else "cpu")
    failed = gate(device, torch.bfloat16 if gpu else torch.float32, args.dim)
    if failed is not None:
        say(f"gate failed: {failed}")
        return 1
    found = bench(args, device)
    met = verdict(found)
    if out := os.environ.get("OUT"):
        text = json.dumps(
            {**environment(device), "method": args.method, "rows": [asdict(row) for row in found]}, indent=1
        )
        Path(out, "comfyui_attention.json").write_text(text + "\n", encoding="utf-8")
    return 0 if met else 1


if __name__ == "__main__":
    with torch.no_grad():
        raise SystemExit(main())
