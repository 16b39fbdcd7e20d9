"""Kill `dit-accel eval` at random moments and compare what it ends with to a run that nobody disturbed.

    python benchmarks/eval_kill.py                      # ten kills

A process is started and killed with SIGKILL, again and again: while it loads, or a random time after its next sample.
Killed KILLS times, it is left to finish. `results.json` must then hold the same bytes as that of the undisturbed run,
once the measurements of time (`speed`) are taken out of both, and so must every sample, clip and static plan.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROOTS = [str(ROOT / part) for part in ("", "kernels", "patches", "eval")]
sys.path[:0] = ROOTS

from dit_accel_eval.runs.summary import without_times  # noqa: E402

#: Share of kills that come soon after the start, amid loading or calibration.
LOADING = 0.25


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=ROOT / "examples/tiny_wan")
    parser.add_argument("--method", default="gna,adaspa,paro")
    parser.add_argument("--density", default="0.8")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--limit", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("eval-kill"))
    return parser.parse_args()


def command(args: argparse.Namespace, out: Path) -> list[str]:
    options = ["--method", args.method, "--density", args.density, "--limit", str(args.limit)]
    options += ["--steps", str(args.steps), "--frames", "17", "--size", "64x64", "--set", "min_tokens=0"]
    options += ["--metrics", "psnr,ssim", "--no-report", "--threads", "1", "--out", str(out)]
    return [sys.executable, "-m", "dit_accel_eval.cli", "eval", "--pipeline", str(args.pipeline), *options]


def start(args: argparse.Namespace, out: Path) -> subprocess.Popen[bytes]:
    inherited = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*inherited, *ROOTS]), "HF_HUB_OFFLINE": "1"}
    log = (out.parent / f"{out.name}.log").open("ab")
    return subprocess.Popen(command(args, out), env=env, stdout=log, stderr=log)


def finish(args: argparse.Namespace, out: Path) -> float:
    began = time.monotonic()
    code = start(args, out).wait()
    if code:
        raise SystemExit(f"{out} ended with code {code}; see {out.parent / out.name}.log")
    return time.monotonic() - began


def finished(out: Path) -> int:
    return len(list(out.glob("samples/*/*.json")))


def kill_once(args: argparse.Namespace, out: Path, loading: float | None, wait: float) -> bool:
    """Start a process and kill it after ``loading`` seconds, or ``wait`` seconds after its next sample.

    Returns:
        Whether it was still running.
    """
    have = finished(out)
    process = start(args, out)
    begun = time.monotonic()
    while process.poll() is None and loading is None and finished(out) <= have:
        time.sleep(0.01)
    try:
        process.wait(wait if loading is None else max(loading - (time.monotonic() - begun), 0.0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    return False


def same_bytes(first: Path, second: Path) -> list[str]:
    """Files that differ, times aside."""
    names = {p.relative_to(f).as_posix() for f in (first, second) for p in f.rglob("*") if p.is_file()}
    return sorted(name for name in names if _content(first / name) != _content(second / name))


def _content(path: Path) -> Any:
    if not path.is_file():
        return None
    if path.suffix != ".json":
        return path.read_bytes()
    data = without_times(json.loads(path.read_text(encoding="utf-8")))
    if path.name == "run.json":  # the command names the folder
        data.pop("command")
    return json.dumps(data, indent=2).encode()


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    whole, killed = args.out / "whole", args.out / "killed"
    for folder in (whole, killed):
        if folder.exists():
            raise SystemExit(f"{folder} is there already; give another --out")
    seconds = finish(args, whole)
    print(f"undisturbed: {finished(whole)} samples in {seconds:.1f} s")
    moments = random.Random(args.seed)
    kills = 0
    each = seconds / finished(whole)
    while kills < args.kills:
        loading = moments.uniform(0, each) if moments.random() < LOADING else None
        if not kill_once(args, killed, loading, moments.uniform(0, each / 2)):
            break
        kills += 1
        when = "loading" if loading is not None else "amid a sample"
        print(f"kill {kills}, {when}: {finished(killed)} of {finished(whole)} samples are there", flush=True)
    finish(args, killed)
    different = same_bytes(whole, killed)
    if different:
        raise SystemExit(f"after {kills} kills these files differ: {', '.join(different)}")
    print(f"killed {kills} times: results.json and all other files are the same, times aside")


if __name__ == "__main__":
    main()
