"""Context parallelism: dense and sparse on one GPU and on several, a step of the shape of Wan 14B.

Started by torchrun; see ``benchmarks/e2e.py --gpus``. The sequence is sharded by diffusers' own engine (Ulysses). At first
each process measures its GPU alone, then all measure together; the slowest process counts. What is known is printed and
written after each stage, and at the deadline every process ends, whatever the others wait for.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from _e2e_models import CASES, TOY, Case
from _e2e_run import PLANS, Subject, cudnn_first, peak, profiled, relative, timed
from _timing import environment
from torch import Tensor

from dit_accel import StepInfo, TokenGeometry
from dit_accel._files import write_whole
from dit_accel.runtime import ModelRun
from dit_accel_patches.parallel import Spread, find_config

__all__ = ["main"]

_ROUNDS = 4
#: Seconds after which a collective operation counts as stuck.
_PATIENCE = 60


class Notes:
    """What is known so far, on the first process, and the end of all at the deadline.

    Args:
        out: JSON list of records.
        head: what the record begins with.
        deadline: seconds from now.
    """

    def __init__(self, out: Path, head: dict[str, Any], deadline: float) -> None:
        self.found: dict[str, Any] = {}
        self._out, self._head, self._began = out, head, time.monotonic()
        self._before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
        # A process that waits for another one's kernels cannot be ended by an exception.
        end = threading.Timer(deadline, self._end)
        end.daemon = True
        end.start()

    def say(self, text: str) -> None:
        """Print with the time and the process."""
        rank = int(os.environ["RANK"])
        sys.stdout.write(f"[{time.monotonic() - self._began:5.1f} s, process {rank}] {text}\n")
        sys.stdout.flush()

    def keep(self, **found: Any) -> None:
        """Add to the record and write it."""
        self.found |= found
        if int(os.environ["RANK"]) == 0:
            record = {**self._head, "context_parallel": self.found}
            write_whole(self._out, (json.dumps([*self._before, record], indent=1) + "\n").encode())

    def _end(self) -> None:
        self.say(f"the deadline is over; known: {', '.join(self.found)}")
        os._exit(3)


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


def steps_of(
    subject: Subject, methods: list[str], density: float, outputs: dict[str, Tensor], label: str, notes: Notes
) -> dict[str, Any]:
    """Dense and sparse steps, after a warm-up; the outputs of the first step of a run are kept for comparison."""
    found: dict[str, Any] = {"ms": {}, "peak_gib": {}, "density": {"dense": 1.0}, "backend": {}, "kernels": {}}
    with cudnn_first(subject.device):
        subject.register()
        subject.restart()
        outputs[f"dense {label}"] = subject.step()
        notes.say(f"{label}: dense step compiled")
        for method in methods:
            with subject.enable(method, density):
                outputs[f"{method} {label}"] = subject.step()
                subject.step()
            notes.say(f"{label}: {method} compiled")
        for kind in ("dense", *methods):
            with nullcontext() if kind == "dense" else subject.enable(kind, density) as handle:
                subject.step()
                subject.step()
                dist.barrier()
                found["ms"][kind], found["peak_gib"][kind] = steps(subject)
                found["kernels"][kind] = profiled(subject.step, subject.device, subject.attentions).top()
                if handle is not None:
                    status = handle.stats()["transformer"]
                    found["density"][kind] = status.density_by_step[max(status.density_by_step)]
                    found["backend"][kind] = status.backend
            notes.say(f"{label}: {kind} {found['ms'][kind]:.1f} ms, peak {found['peak_gib'][kind]:.1f} GiB")
    return found


def attention_bits(subject: Subject, method: str, density: float) -> bool:
    """Whether this process's part of the attention of random tensors has the bits that one process finds for it."""
    case, device, size, rank = subject.case, subject.device, dist.get_world_size(), dist.get_rank()
    made = torch.Generator(device).manual_seed(2)
    shape = (case.batch, case.tokens, case.heads, case.dim)
    qkv = [torch.randn(shape, generator=made, device=device, dtype=subject.dtype) for _ in range(3)]
    geometry, chosen = TokenGeometry(case.grid), subject.method(method, density)
    spread_out = Spread(find_config([subject.model]), subject.model)
    spread_out.begin(subject.model, (), {}, geometry)
    found = []
    for parts in (qkv, [x.tensor_split(size, 1)[rank] for x in qkv]):
        run = ModelRun(chosen, model="bits", min_tokens=0)
        run.set_layers(("layer",))

        def here(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, run: ModelRun = run) -> Tensor:
            return run.attend(q, k, v, layer=0, scale=None, key_valid=mask, dense=_not_dense)

        for step in range(2):
            run.begin_forward(geometry, StepInfo(step=step + 1, steps=50))
            handle = SimpleNamespace(state=SimpleNamespace(run=run), index=0)
            alone = parts is qkv
            out = here(*parts, None) if alone else spread_out.attend(*parts, None, handle, here, _not_dense)
        found.append(out.tensor_split(size, 1)[rank] if alone else out)
    return torch.equal(*found)


def _not_dense(*_: Any) -> Tensor:
    raise RuntimeError("this call should have been sparse")


def gathered(found: dict[str, Any]) -> dict[str, Any]:
    """Of the slowest process, with those of each."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    slowest = {
        key: {kind: max(one[key][kind] for one in everyone) for kind in found[key]} for key in ("ms", "peak_gib")
    }
    return {**found, **slowest, "by_process": [{key: one[key] for key in slowest} for one in everyone]}


def measure(case: Case, args: argparse.Namespace, device: torch.device, notes: Notes) -> dict[str, Any]:
    """One GPU and all of them, in one record."""
    toy, size, methods = device.type == "cpu", dist.get_world_size(), args.methods[0]
    dtype = torch.float32 if toy else torch.bfloat16
    small: dict[str, Any] = {"block": 64, "compiler": "eager"} if toy else {"block": args.block}
    layers = tuple(args.layers or case.some)
    notes.keep(name=case.name, tokens=case.tokens, layers=list(layers), of_layers=list(case.layers), processes=size)
    outputs: dict[str, Tensor] = {}
    subject = Subject(case, layers, device, dtype, **small)
    subject.compile()
    notes.say("built")
    one = gathered(steps_of(subject, methods, args.density, outputs, "one", notes))
    notes.keep(one=one)
    del subject
    subject = Subject(case, layers, device, dtype, **small)
    spread(subject, size)
    # Not as one graph: diffusers' hook that splits the input of the first block breaks it.
    subject.compile(whole=False)
    several = gathered(steps_of(subject, methods, args.density, outputs, "several", notes))
    pairs = {kind: (outputs[f"{kind} several"], outputs[f"{kind} one"]) for kind in one["ms"]}
    notes.keep(
        several=several,
        scaling={kind: one["ms"][kind] / several["ms"][kind] for kind in pairs},
        error_against_one={kind: relative(*pair) for kind, pair in pairs.items()},
        same_bits={kind: torch.equal(*pair) for kind, pair in pairs.items()},
    )
    del pairs, outputs
    same: dict[str, bool] = {}
    for method in methods:
        everyone: list[Any] = [None] * size
        dist.all_gather_object(everyone, attention_bits(subject, method, args.density))
        same[method] = all(everyone)
    notes.keep(attention_same_bits=same)
    notes.say(f"attention has the same bits on one process and on {size}: {same}")
    return notes.found


def table(found: dict[str, Any]) -> str:
    """What was found, as text."""
    one, several = found["one"], found["several"]
    lines = [f"{found['name']}, {found['layers']} layers of {found['of_layers']}, {found['processes']} processes"]
    for kind in one["ms"]:
        gains = [where["ms"]["dense"] / where["ms"][kind] for where in (one, several)]
        lines.append(
            f"{kind:7s} one {one['ms'][kind]:9.1f} ms, several {several['ms'][kind]:9.1f} ms: "
            f"{found['scaling'][kind]:.2f} x, over dense {gains[0]:.2f} and {gains[1]:.2f} x at density "
            f"{one['density'][kind]:.3f}, off by {found['error_against_one'][kind]:.1e}"
            + (", the same bits" if found["same_bits"][kind] else "")
        )
    return "\n".join(lines)


def main(args: argparse.Namespace) -> int:
    """Run under torchrun."""
    if "RANK" not in os.environ:
        raise RuntimeError(f"--gpus {args.gpus} runs under torchrun --nproc-per-node {args.gpus}")
    cuda = torch.cuda.is_available() and not args.toy
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast over NVLink is not always to be had, and is not needed
    notes = Notes(args.out, {**environment(device), "density": args.density, "plans": PLANS}, args.deadline)
    wait = datetime.timedelta(seconds=_PATIENCE)
    if cuda:
        dist.init_process_group("nccl", timeout=wait, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=wait)
    try:
        notes.say("joined")
        name = (args.cases or (["toy-wan"] if args.toy else ["wan-14b-720p"]))[0]
        found = measure({**CASES, **TOY}[name], args, device, notes)
        if dist.get_rank() == 0:
            sys.stdout.write(table(found) + "\n")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return 0
