"""Context parallelism: dense and sparse on one GPU and on several, a step of the shape of Wan 14B.

Started by torchrun; see ``benchmarks/e2e.py --gpus``. The sequence is sharded by diffusers' own engine (Ulysses). The first
process measures one GPU while the others wait, then all measure together; the slowest process counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from _e2e_models import CASES, TOY, Case
from _e2e_run import PLANS, Subject, cudnn_first, peak, relative, timed
from _timing import environment
from torch import Tensor

from dit_accel._files import write_whole

__all__ = ["main"]

_ROUNDS = 4


def spread(subject: Subject, size: int) -> None:
    """Turn diffusers' context parallelism on."""
    from diffusers import ContextParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    kind = subject.device.type
    if kind == "cpu":
        torch.accelerator.device_count = lambda: size  # type: ignore[assignment]  # diffusers divides by it
    mesh = init_device_mesh(kind, (1, size), mesh_dim_names=("ring", "ulysses"))
    subject.model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=size, mesh=mesh))


def steps(subject: Subject, rounds: int = _ROUNDS) -> tuple[float, float]:
    """Median milliseconds of a step and its highest memory in GiB."""
    with peak(subject.device) as highest:
        found = timed(subject.step, subject.device, rounds)
    return statistics.median(found), highest[0]


def both(subject: Subject, method: str, density: float, outputs: dict[str, Tensor], label: str) -> dict[str, Any]:
    """Dense and sparse steps; the outputs of the first step of a run are kept for comparison."""
    subject.restart()
    outputs[f"dense {label}"] = subject.step()
    dense_ms, dense_peak = steps(subject)
    with subject.enable(method, density) as handle:
        outputs[f"sparse {label}"] = subject.step()
        subject.step()
        sparse_ms, sparse_peak = steps(subject)
        status = handle.stats()["transformer"]
    last = max(status.density_by_step)
    found = {"dense_ms": dense_ms, "sparse_ms": sparse_ms, "dense_peak_gib": dense_peak, "sparse_peak_gib": sparse_peak}
    return {**found, "density": status.density_by_step[last], "backend": status.backend, "reasons": status.reasons}


def on_one(make: Callable[[], Subject], method: str, density: float, outputs: dict[str, Tensor]) -> dict[str, Any]:
    """The first process alone."""
    subject = make()
    subject.compile()
    with cudnn_first(subject.device):
        warm(subject, method, density)
        return both(subject, method, density, outputs, "one")


def warm(subject: Subject, method: str, density: float) -> None:
    """Compile the dense and the sparse step."""
    subject.restart()
    subject.step()
    with subject.enable(method, density):
        subject.step()
        subject.step()


def measure(case: Case, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One GPU and all of them, in one record."""
    toy, size = device.type == "cpu", dist.get_world_size()
    dtype = torch.float32 if toy else torch.bfloat16
    small: dict[str, Any] = {"block": 64, "compiler": "eager"} if toy else {"block": args.block}
    layers = tuple(args.layers or case.some)
    method = args.methods[0]

    def make() -> Subject:
        return Subject(case, layers, device, dtype, **small)

    outputs: dict[str, Tensor] = {}
    one = on_one(make, method, args.density, outputs) if dist.get_rank() == 0 else {}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    dist.barrier()
    subject = make()
    spread(subject, size)
    # Not as one graph: diffusers' hook that splits the input of the first block breaks it.
    subject.compile(whole=False)
    with cudnn_first(device):
        warm(subject, method, args.density)
        dist.barrier()
        several = both(subject, method, args.density, outputs, "several")
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, several)
    slowest = {key: max(found[key] for found in gathered) for key in ("dense_ms", "sparse_ms", "dense_peak_gib")}
    several = {**several, **slowest, "by_process": gathered}
    if dist.get_rank() != 0:
        return {}
    errors = {kind: relative(outputs[f"{kind} several"], outputs[f"{kind} one"]) for kind in ("dense", "sparse")}
    scaling = {kind: one[f"{kind}_ms"] / several[f"{kind}_ms"] for kind in ("dense", "sparse")}
    return {
        "name": case.name,
        "tokens": case.tokens,
        "layers": list(layers),
        "method": method,
        "processes": size,
        "one": one,
        "several": several,
        "scaling": scaling,
        "error_against_one": errors,
    }


def table(found: dict[str, Any]) -> str:
    """What was found, as text."""
    lines = [f"{found['name']}, {found['layers']} layers, method {found['method']}, {found['processes']} processes"]
    for kind in ("dense", "sparse"):
        one, several = found["one"][f"{kind}_ms"], found["several"][f"{kind}_ms"]
        error = found["error_against_one"][kind]
        lines.append(
            f"{kind:7s} one {one:9.1f} ms, several {several:9.1f} ms: {one / several:.2f} x, off by {error:.1e}"
        )
    for where in ("one", "several"):
        gain = found[where]["dense_ms"] / found[where]["sparse_ms"]
        lines.append(f"sparse over dense, {where}: {gain:.2f} x at density {found[where]['density']:.3f}")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> int:
    """Run under torchrun."""
    if "RANK" not in os.environ:
        raise RuntimeError(f"--gpus {args.gpus} runs under torchrun --nproc-per-node {args.gpus}")
    cuda = torch.cuda.is_available() and not args.toy
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        name = (args.cases or (["toy-wan"] if args.toy else ["wan-14b-720p"]))[0]
        found = measure({**CASES, **TOY}[name], args, device)
        if dist.get_rank() == 0:
            record = {**environment(device), "density": args.density, "plans": PLANS, "context_parallel": found}
            records = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
            write_whole(args.out, (json.dumps([*records, record], indent=1) + "\n").encode())
            sys.stdout.write(table(found) + "\n")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return 0
