"""Random calls of the kernels against a masked reference, under a watchdog: a wrong barrier does not fail, it hangs.

    PYTHONPATH=kernels python scripts/stress_kernels.py --count 10000 --workers 12  # a GPU
    PYTHONPATH=kernels python scripts/stress_kernels.py --kernels cpu --count 50 # no GPU needed
    PYTHONPATH=kernels python scripts/stress_kernels.py --kernels hopper --seed 123 --count 1   # one call again
    PYTHONPATH=kernels python scripts/stress_kernels.py --special                # graphs, compile, 2**31 elements
    PYTHONPATH=kernels python scripts/stress_kernels.py --sanitize               # compute-sanitizer on small shapes

Each seed makes one call of each kernel: shapes, lists, orders, remainder, ``key_valid``, windows, gathered keys, strides,
dtypes, unequal lengths, empty rows, extreme logits, NaN where nothing may be read. What must be compiled differs only
between a few *variants* for each kernel, and all calls of a variant are made by one worker. Workers say their seed before
each call and read the results of sixteen calls at once; a worker that is silent for too long is killed and its seed is
printed. Every eighth call is made twice and must give the same bits.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]

from _stress_calls import VARIANTS, Pending, Variant, start_call  # noqa: E402

SILENCE_S = 45.0  # a compilation included
BATCH = 16  # calls whose results are read at once


def say(text: str) -> None:
    """Print at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def variant_of(kernel: str, seed: int) -> Variant:
    """The compiled variant that a seed calls."""
    return VARIANTS[kernel][seed % len(VARIANTS[kernel])]


def work(args: argparse.Namespace) -> int:
    """Make the calls of a worker; says ``try``, ``ok`` and ``bad`` with kernel and seed."""
    device = torch.device("cpu" if args.kernels == ["cpu"] else "cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    # Uninitialised memory is filled with NaN, so what a kernel does not write shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    batch: list[tuple[str, int, Pending | str]] = []
    bad = 0
    for seed in range(args.seed, args.seed + args.count):
        for kernel in args.kernels:
            if worker_of(args.kernels, kernel, seed, args.workers) != args.index:
                continue
            say(f"try {kernel} {seed}")
            try:
                made: Pending | str = start_call(kernel, variant_of(kernel, seed), seed, device, twice=seed % 8 == 0)
            except Exception as error:
                made = _words(error)
            batch.append((kernel, seed, made))
            if len(batch) >= BATCH:
                bad += settle(batch)
    return min(bad + settle(batch), 1)


def worker_of(kernels: list[str], kernel: str, seed: int, workers: int) -> int:
    """The worker that makes a call: one for all calls of a variant, so that nothing is compiled twice."""
    before = sum(len(VARIANTS[name]) for name in kernels[: kernels.index(kernel)])
    return (before + seed % len(VARIANTS[kernel])) % workers


def settle(batch: list[tuple[str, int, Pending | str]]) -> int:
    """Read what a batch of calls gave at once, say which were right, and empty it; how many were wrong."""
    pending = [made for _, _, made in batch if isinstance(made, Pending)]
    try:
        numbers = torch.cat([p.numbers for p in pending]).tolist() if pending else []
    except Exception as error:  # of some call of the batch: nobody knows which
        numbers, broken = [], _words(error)
        batch[:] = [(kernel, seed, broken) for kernel, seed, _ in batch]
    bad, at = 0, 0
    for kernel, seed, made in batch:
        wrong: str | None
        if isinstance(made, Pending):
            size = made.numbers.numel()
            wrong = made.judge(numbers[at : at + size])
            at += size
        else:
            wrong = made
        bad += wrong is not None
        say(f"bad {kernel} {seed} {wrong}" if wrong else f"ok {kernel} {seed}")
    batch.clear()
    return bad


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@dataclass
class Worker:
    """A process that makes calls, and what it said last."""

    process: subprocess.Popen[str]
    last: str = "nothing"
    heard: float = 0.0
    said: list[str] | None = None


def start(args: argparse.Namespace, lines: queue.Queue[tuple[int, str]], index: int, *more: str) -> Worker:
    """Start a worker whose lines go to the queue under its index."""
    command = [sys.executable, str(Path(__file__).resolve()), "--work", "--kernels", *args.kernels, *more]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    worker = Worker(process, heard=time.monotonic(), said=[])

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put((index, line.rstrip("\n")))
        lines.put((index, ""))

    threading.Thread(target=read, daemon=True).start()
    return worker


def watch(
    workers: list[Worker], lines: queue.Queue[tuple[int, str]], end: float, silence: float | None = None
) -> tuple[int, list[str]]:
    """Wait for workers; how many calls were right, and what went wrong. None of them outlives this."""
    live = set(range(len(workers)))
    try:
        return _listen(workers, lines, end, SILENCE_S if silence is None else silence, live)
    finally:
        for index in live:
            workers[index].process.kill()


def _listen(
    workers: list[Worker], lines: queue.Queue[tuple[int, str]], end: float, silence: float, live: set[int]
) -> tuple[int, list[str]]:
    right, wrong = 0, []
    while live:
        try:
            index, line = lines.get(timeout=1.0)
            worker = workers[index]
            worker.heard = time.monotonic()
            if line == "":
                live.discard(index)
                code = worker.process.wait()
                if code not in (0, 1) and worker.process.returncode != -9:
                    wrong.append(
                        f"worker ended with {code} after '{worker.last}': {' | '.join((worker.said or [])[-3:])}"
                    )
            elif line.startswith("ok "):
                right += 1
            elif line.startswith("bad "):
                wrong.append(line)
            elif line.startswith("try "):
                worker.last = line
            elif worker.said is not None:
                worker.said.append(line)
        except queue.Empty:
            pass
        now = time.monotonic()
        for index in list(live):
            if now - workers[index].heard > silence:
                wrong.append(f"hang: silent for {silence:.0f} s after '{workers[index].last}'")
                workers[index].process.kill()
                live.discard(index)
            elif now > end:  # the calls that were not made are seen in the count
                say(f"time is up at '{workers[index].last}'")
                workers[index].process.kill()
                live.discard(index)
    return right, wrong


def stress(args: argparse.Namespace) -> int:
    """Share the calls among workers, each of which compiles its own variants."""
    began, end, lines = time.monotonic(), time.monotonic() + args.budget, queue.Queue[tuple[int, str]]()
    kernels, share = args.kernels, -(-args.count // len(args.kernels))
    calls = ("--seed", str(args.seed), "--count", str(share), "--workers", str(args.workers))
    workers = [start(args, lines, index, *calls, "--index", str(index)) for index in range(args.workers)]
    right, failures = watch(workers, lines, end, args.silence)
    for line in failures[:40]:
        say(line)
    say(
        f"{right} calls right, {len(failures)} failures, seeds from {args.seed}, kernels {' '.join(kernels)}, "
        f"{time.monotonic() - began:.0f} s"
    )
    return 1 if failures else 0


def sanitize(args: argparse.Namespace) -> int:
    """Run one call of each kernel under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer") or next(
        (str(p) for folder in ("/usr/local", "/opt") for p in Path(folder).glob("**/bin/compute-sanitizer")), None
    )
    if tool is None:
        say("compute-sanitizer is not on this machine: nothing was checked")
        return 3
    code = 0
    for check in ("memcheck", "racecheck") if args.races else ("memcheck",):
        for kernel in args.kernels:
            call = [sys.executable, str(Path(__file__).resolve()), "--work", "--kernels", kernel, "--count", "1"]
            call += ["--workers", "1"]
            command = [tool, "--tool", check, "--error-exitcode", "9", *call, "--seed", str(args.seed)]
            env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=args.budget, env=env, cwd=ROOT)
            except subprocess.TimeoutExpired:
                say(f"{check} {kernel}: not done after {args.budget:.0f} s")
                code = 1
                continue
            ok = [line for line in done.stdout.splitlines() if line.startswith("ok ")]
            summary = [line for line in (done.stdout + done.stderr).splitlines() if "SUMMARY" in line]
            clean = bool(ok) and done.returncode == 0
            say(f"{check} {kernel}: {'clean' if clean else f'exit {done.returncode}'}; {' '.join(summary)}")
            if not clean:
                say("\n".join((done.stdout + done.stderr).splitlines()[:40]))
                code = 1
    return code


def main(argv: list[str] | None = None) -> int:
    """Parse, then stress, check special cases, or work."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kernels", nargs="+", default=None, choices=list(VARIANTS))
    parser.add_argument("--count", type=int, default=1000, help="calls of all kernels together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=300.0, help="seconds after which everything is stopped")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--special", action="store_true", help="CUDA graphs, torch.compile, more than 2**31 elements")
    parser.add_argument("--sanitize", action="store_true", help="compute-sanitizer on one small call of each kernel")
    parser.add_argument("--races", action="store_true", help="with --sanitize: racecheck, too")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--silence", type=float, default=SILENCE_S, help="seconds after which a worker hangs")
    parser.add_argument("--index", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers are ended, too
    cuda = torch.cuda.is_available()
    hopper = cuda and torch.cuda.get_device_capability() == (9, 0)
    if args.kernels is None:
        args.kernels = ["cpu"] if not cuda else [k for k in VARIANTS if k != "cpu" and (hopper or "hopper" not in k)]
    if args.kernels != ["cpu"] and not cuda:
        say(f"needs a GPU for {' '.join(args.kernels)}")
        return 2
    if args.special:
        from _stress_special import special

        return special(say)
    if args.work:
        return work(args)
    return sanitize(args) if args.sanitize else stress(args)


if __name__ == "__main__":
    raise SystemExit(main())
