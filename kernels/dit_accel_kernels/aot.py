"""Compile every kernel for every GPU it is meant for, on a machine without one: ``python -m dit_accel_kernels.aot``.

Triton lowers to PTX or AMD assembly and assembles it without a device. What can go wrong on a GPU that nobody here owns
(a kernel that does not compile, that needs more shared memory than there is, that spills) is found this way.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from .aot_spec import AotSpec

__all__ = ["SHARED_LIMITS", "AotResult", "check", "collect", "main"]

# Bytes that one block may ask for (CUDA programming guide, table of compute capabilities; AMD CDNA3 ISA).
SHARED_LIMITS = {
    "sm_80": 166912,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
}


@dataclass(frozen=True)
class AotResult:
    """Outcome of one kernel on one target.

    Attributes:
        name: name of the spec.
        target: for example ``"sm_90"``.
        registers: registers a thread (vector registers on AMD), -1 if unknown.
        spill_bytes: bytes of registers that a thread spills to memory, -1 if unknown.
        shared_bytes: shared memory of a block.
        seconds: time to compile.
        problem: what is wrong, empty if nothing.
    """

    name: str
    target: str
    registers: int = -1
    spill_bytes: int = -1
    shared_bytes: int = -1
    seconds: float = 0.0
    problem: str = ""


def collect() -> list[tuple[str, AotSpec]]:
    """Every spec of the package with the module that holds it.

    Raises:
        ValueError: two specs share a name.
    """
    package = importlib.import_module(__package__)
    found: dict[str, tuple[str, AotSpec]] = {}
    for info in sorted(pkgutil.walk_packages(package.__path__, f"{__package__}."), key=lambda i: i.name):
        if info.name == __name__ or info.name.endswith(".__main__"):
            continue
        for spec in getattr(importlib.import_module(info.name), "AOT_SPECS", ()):
            module, known = found.setdefault(spec.name, (info.name, spec))
            if known is not spec:
                raise ValueError(f"AOT spec names must be unique, got {spec.name!r} in {module} and {info.name}")
    return list(found.values())


def _source(spec: AotSpec) -> Any:
    names = list(spec.signature)
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in spec.divisible_by_16}
    if spec.gluon:
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource(fn=spec.fn, signature=spec.signature, constexprs=spec.constexprs, attrs=attrs)
    from triton.compiler import ASTSource

    return ASTSource(fn=spec.fn, signature=spec.signature, constexprs=spec.constexprs, attrs=attrs)


def _target(name: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64)


def _nvidia_resources(ptx: str, capability: int, options: str) -> tuple[int, int]:
    """Registers and spilled bytes of a thread, from a second run of the assembler that Triton bundles, with ``options``."""
    from triton.backends.nvidia.compiler import get_ptxas

    arch = f"sm_{capability}" + ("a" if capability >= 90 else "")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.ptx")
        with open(path, "w", encoding="utf-8") as file:
            file.write(ptx)
        command = [get_ptxas(capability).path, "-v", *options.split(), f"--gpu-name={arch}", path]
        command += ["-o", os.path.join(folder, "out")]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", log)]
    return max(registers, default=-1), sum(spills)


def _amd_resources(assembly: str) -> tuple[int, int]:
    registers = [int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", assembly)]
    spills = [int(n) for n in re.findall(r"\.vgpr_spill_count:\s+(\d+)", assembly)]
    return max(registers, default=-1), 4 * sum(spills)


def _innermost(error: BaseException) -> str:
    """The cause of a compiler's error; the outer ones only repeat the source around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = getattr(error, "error_message", None) or str(error)
    return f"{type(error).__name__}: {' '.join(text.split())[-300:]}"


def check(module: str, name: str, target: str) -> AotResult:
    """Compile one spec for one target and hold it against its limits.

    Args:
        module: dotted name of the module whose ``AOT_SPECS`` holds the spec.
        name: name of the spec.
        target: one of its targets.
    """
    import triton

    spec = next(s for s in importlib.import_module(module).AOT_SPECS if s.name == name)
    began = time.perf_counter()
    try:
        kernel = triton.compile(_source(spec), target=_target(target), options=dict(spec.options))
        if target.startswith("sm_"):
            options = spec.options.get("ptx_options", "")
            registers, spills = _nvidia_resources(kernel.asm["ptx"], int(target[3:]), options)
        else:
            registers, spills = _amd_resources(kernel.asm["amdgcn"])
    except Exception as error:  # a compiler fails in many ways; each is the result
        seconds = time.perf_counter() - began
        return AotResult(name, target, seconds=seconds, problem=_innermost(error))
    shared = int(kernel.metadata.shared)
    problems = []
    if shared > SHARED_LIMITS[target]:
        problems.append(f"shared memory must be at most {SHARED_LIMITS[target]} bytes, got {shared}")
    if spills > spec.max_spill_bytes:
        problems.append(f"spills must be at most {spec.max_spill_bytes} bytes, got {spills}")
    return AotResult(name, target, registers, spills, shared, time.perf_counter() - began, "; ".join(problems))


def _run(jobs: list[tuple[str, str, str]], workers: int) -> list[AotResult]:
    if workers <= 1:
        return [check(*job) for job in jobs]
    # Fresh processes: a forked one would share torch's threads and MLIR's state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return list(pool.map(check, *zip(*jobs, strict=True)))


def _table(results: list[AotResult]) -> str:
    width = max((len(r.name) for r in results), default=4)
    lines = [f"{'kernel':<{width}}  target  registers  spills  shared KiB  seconds"]
    for r in results:
        line = f"{r.name:<{width}}  {r.target:<6}  {r.registers:>9}  {r.spill_bytes:>6}  {r.shared_bytes / 1024:>10.1f}"
        lines.append(f"{line}  {r.seconds:>7.1f}  {r.problem}".rstrip())
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Compile, print a table or JSON, and return 1 if any kernel fails."""
    parser = argparse.ArgumentParser(prog="python -m dit_accel_kernels.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.add_argument("--filter", default="", help="only kernels whose name or target contains this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.stderr.write("unset TRITON_INTERPRET: interpreted kernels cannot be compiled\n")
        return 2
    jobs = [(module, spec.name, target) for module, spec in collect() for target in spec.targets]
    jobs = [job for job in jobs if args.filter in f"{job[1]} {job[2]}"]
    if not jobs:
        sys.stderr.write(f"no kernel matches {args.filter!r}\n")
        return 2
    results = _run(jobs, min(args.jobs, len(jobs)))
    failed = sum(bool(r.problem) for r in results)
    out = json.dumps([asdict(r) for r in results], indent=1) if args.json else _table(results)
    sys.stdout.write(f"{out}\n")
    sys.stderr.write(f"{len(results)} compilations, {failed} failed\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
