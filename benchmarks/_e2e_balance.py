"""How even the planned work of heads is over processes, as they come and dealt out anew, on real plans of tiny Wan.

``python benchmarks/_e2e_balance.py`` generates one clip for each method in one process and reads the density of each head
in each plan, which is its work. No second process is needed: how heads are dealt out follows from these numbers.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from pathlib import Path
from typing import Any

import torch
from _timing import environment
from diffusers import WanPipeline
from torch import Tensor

import dit_accel
from dit_accel._files import write_whole
from dit_accel_patches.parallel_exchange import even_counts
from dit_accel_patches.parallel_heads import dealt

ROOT = Path(__file__).parents[1]
METHODS: dict[str, dict[str, Any]] = {
    "top_p:0.9": {"method": None, "score": "mass", "select": "top_p:0.9"},
    "top_p at density 0.3": {"method": None, "score": "mass", "select": "top_p", "density": 0.3},
    "adaspa": {"method": "adaspa", "density": 0.3},
    "svg2": {"method": "svg2"},
}


def planned(pipe: WanPipeline, options: dict[str, Any]) -> Tensor:
    """Work of each head in each plan, ``[plans, H]``, dense attention of the head being 1."""
    made = torch.Generator().manual_seed(0)
    sizes: dict[str, Any] = {"height": 128, "width": 128, "num_frames": 33, "num_inference_steps": 10}
    with dit_accel.enabled(pipe, **options) as handle:
        pipe("red heart", generator=made, guidance_scale=4.0, output_type="latent", **sizes)
        calls = handle.runs["transformer"].ledger.calls
    plans = {id(call.exact): call.exact for call in calls if isinstance(call.exact, Tensor)}
    return torch.stack([density.mean(0) for density in plans.values()])


def by_process(work: Tensor, placed: Tensor, parts: int) -> Tensor:
    """Work of each process, ``[parts]``."""
    return torch.stack([work[part].sum() for part in placed.split(even_counts(len(work), parts))])


def greedy(work: Tensor, parts: int) -> Tensor:
    """Longest first to the process with the least work, any number of heads each: what waiting for the device could buy."""
    sums = [(0.0, part) for part in range(parts)]
    for value in sorted(work.tolist(), reverse=True):
        least, part = heapq.heappop(sums)
        heapq.heappush(sums, (least + value, part))
    return torch.tensor([total for total, _ in sums])


def unevenness(works: Tensor, parts: int) -> dict[str, float]:
    """Mean over plans of the work of the busiest process over that of the mean one."""
    heads = torch.arange(works.shape[1])
    found: dict[str, list[float]] = {"as they come": [], "dealt out": [], "greedy, any number": []}
    for work in works:
        sums = by_process(work, heads, parts), by_process(work, dealt(work, parts), parts), greedy(work, parts)
        for name, total in zip(found, sums, strict=True):
            found[name].append(float(total.max() / total.mean()))
    return {name: sum(values) / len(values) for name, values in found.items()}


def main() -> int:
    """Print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "head_balance.json")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args()
    pipe = WanPipeline.from_pretrained(ROOT / "examples" / "tiny_wan")
    pipe.set_progress_bar_config(disable=True)
    rows, layers = [], len(pipe.transformer.blocks)
    for name in args.methods:
        works = planned(pipe, METHODS[name])
        spread = float((works.std(1) / works.mean(1)).mean())
        # The layers of one step taken as one layer of 35 heads, about as many as large models have.
        together = works[: len(works) // layers * layers].reshape(-1, layers * works.shape[1])
        for found, parts in [(works, 2), (works, 3), (works, 4), (together, 2), (together, 4), (together, 8)]:
            rows.append({"method": name, "plans": len(found), "heads": found.shape[1], "processes": parts})
            rows[-1] |= {"variation": spread, **unevenness(found, parts)}
            numbers = ", ".join(f"{k} {v:.3f}" for k, v in rows[-1].items() if isinstance(v, float))
            sys.stdout.write(f"{name:22s} {found.shape[1]:3d} heads, {parts} processes: {numbers}\n")
    record = {**environment(torch.device("cpu")), "rows": rows}
    write_whole(args.out, (json.dumps(record, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
