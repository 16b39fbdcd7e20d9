"""Whole denoising steps of full-size transformers: dense compiled with cuDNN attention against ours compiled.

``python benchmarks/e2e.py`` takes about three minutes on one H200; ``--toy`` runs all of it on the CPU with tiny models.
Weights are random, so speed and memory are those of the checkpoint and pictures are noise; how plans are made is told in
each record (``plans``). A model may have fewer blocks than its checkpoint (``--layers``), which the record says; all blocks
take the same time.

Each model has a process of its own. All compile at once and pass the correctness gate; then one measures at a time, while
the others are stopped. Share of attention ``f``: the kernels of self-attention in a profiled dense step over the time of
a dense step. Ceiling: ``1 / (1 - f + f d)`` with ``d`` the work of a sparse step over that of dense attention.

``NAME:whole`` as a case has all blocks and few steps. ``--prepare`` compiles only, so that a later run finds its kernels.

``torchrun --nproc-per-node 2 benchmarks/e2e.py --gpus 2`` compares dense and sparse context parallelism with one GPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from _e2e_measure import Measurement
from _e2e_models import CASES, TOY, Case
from _e2e_run import METHODS, PLANS, Subject
from _e2e_workers import mark, measure_all, say
from _timing import environment

from dit_accel._files import write_whole
from dit_accel_kernels import backends

#: Behind the name of a case: with all blocks, and few steps, since each takes long.
_WHOLE = ":whole"
RESULTS = Path(__file__).parent / "results"


def stage(text: str) -> list[str]:
    """Methods that are measured in one go.

    Raises:
        argparse.ArgumentTypeError: if there is no such method.
    """
    names = text.split(",")
    if not set(names) <= set(METHODS):
        raise argparse.ArgumentTypeError(f"methods must be of {', '.join(METHODS)}, got {text!r}")
    return names


def options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=None, help=f"of {', '.join(CASES)}; NAME{_WHOLE} has all blocks")
    parser.add_argument(
        "--methods",
        nargs="*",
        type=stage,
        default=[["auto", "plain"], ["kept", "hooked"], ["union"]],
        help=f"of {', '.join(METHODS)}; those joined by commas are measured in one go, all models before the next",
    )
    parser.add_argument(
        "--no-self-test", action="store_true", help="take kernels without their self-test, where their tests have run"
    )
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="compile and pass the gate, and measure nothing: a later run finds its kernels compiled",
    )
    parser.add_argument("--density", type=float, default=0.2, help="work of a sparse step over dense work")
    parser.add_argument("--layers", type=int, nargs="*", default=None, help="blocks of each list, 0 for all")
    parser.add_argument("--block", type=int, default=128, help="tokens in a block; auto has its own")
    parser.add_argument("--toy", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--gpus", type=int, default=1, help="processes of torchrun, for context parallelism")
    parser.add_argument("--out", type=Path, default=RESULTS / "e2e.json")
    parser.add_argument(
        "--deadline",
        type=float,
        default=600.0,
        help="seconds for everything; what is under way then is written as far as it got",
    )
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def layers_of(case: Case, asked: list[int] | None) -> tuple[int, ...]:
    """Blocks of each list.

    Raises:
        ValueError: if not one number is given for each list, or more than there are.
    """
    if asked is None:
        return case.some
    if len(asked) != len(case.layers) or any(not 0 <= n <= most for n, most in zip(asked, case.layers, strict=False)):
        raise ValueError(f"--layers of {case.name} must be {len(case.layers)} numbers up to {case.layers}, got {asked}")
    return tuple(n or most for n, most in zip(asked, case.layers, strict=True))


def subject_of(asked: str, args: argparse.Namespace, device: torch.device) -> Subject:
    """Build one model."""
    name, whole, _ = asked.partition(_WHOLE)
    case = {**CASES, **TOY}[name]
    toy = name in TOY
    dtype = torch.float32 if toy else torch.bfloat16
    small: dict[str, Any] = {"block": 64, "compiler": "eager"} if toy else {"block": args.block}
    return Subject(case, case.layers if whole else layers_of(case, args.layers), device, dtype, **small)


def worker(args: argparse.Namespace) -> None:
    """A process of one model: at each stage warm up, say so, wait for a line, measure, tell what is known so far."""
    device = torch.device("cuda" if torch.cuda.is_available() and not args.toy else "cpu")
    subject = subject_of(args.worker, args, device)
    mark(f"{args.worker}: built")
    need: dict[str, Any] = {"device": device, "dtype": subject.dtype, "head_dim": subject.case.dim, "block_q": 128}
    for block_k in (128, 64):
        mark(f"{args.worker}: 128x{block_k}: {backends.choose_backend(**need, block_k=block_k)}")
    subject.compile()
    found = Measurement(subject, args.density, brief=args.worker.endswith(_WHOLE))
    for methods in args.methods:
        found.gate(methods)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if args.prepare:
            say({"known": {}, "stage_over": True, "complete": methods is args.methods[-1]})
            continue
        say({"ready": args.worker})
        sys.stdin.readline()
        for known in found.measure(methods):
            say({"known": known, "stage_over": False, "complete": False})
        say({"known": found.record(), "stage_over": True, "complete": methods is args.methods[-1]})


def _untested(*_: Any) -> None: ...


def commands(names: list[str], args: argparse.Namespace) -> dict[str, list[str]]:
    """How the worker of each model is started."""
    command = [
        sys.executable,
        str(Path(__file__)),
        "--density",
        str(args.density),
        "--methods",
        *map(",".join, args.methods),
    ]
    command += ["--prepare"] if args.prepare else []
    command += ["--toy"] if args.toy else ["--block", str(args.block)]
    command += ["--no-self-test"] if args.no_self_test else []
    command += ["--layers", *map(str, args.layers)] if args.layers is not None else []
    return {name: [*command, "--worker", name] for name in names}


def write(path: Path, record: dict[str, Any]) -> None:
    """Append a record to the JSON list, and its rows to the CSV beside it."""
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    write_whole(path, (json.dumps([*records, record], indent=1) + "\n").encode())
    table = path.with_suffix(".csv")
    new = not table.exists()
    with table.open("a", newline="", encoding="utf-8") as file:
        rows = [row for case in record["cases"] for row in _rows(case, record)]
        if rows:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(rows)


def _rows(case: dict[str, Any], record: dict[str, Any]) -> list[dict[str, Any]]:
    shared = {key: case[key] for key in ("name", "tokens", "batch")}
    shared["layers"] = "+".join(map(str, case["layers"])) + " of " + "+".join(map(str, case["of_layers"]))
    rows = []
    for method, row in case["methods"].items():
        numbers = {"dense_ms": case["dense_ms"], "attention_share": case["attention_share"], **row}
        kept: tuple[str, ...] = ("dense_ms", "attention_share", "density", "step_ms", "speedup")
        kept += ("ceiling", "of_ceiling")
        kept += ("planning_step_ms", "peak_gib", "peak_ratio", "whole_peak_ratio", "whole_planning_peak_ratio")
        rounded = {key: f"{numbers[key]:.4g}" for key in kept}
        told = {"method": method, "backend": row["backend"], "blocks": row["blocks"]}
        rows.append({**shared, **told, **rounded, **_where(record)})
    return rows


def _where(record: dict[str, Any]) -> dict[str, str]:
    return {key: record[key] for key in ("gpu", "torch", "triton", "commit", "date")}


def table(record: dict[str, Any]) -> str:
    """What was found, as text."""
    head = f"{'':26s}{'layers':>9s} {'method':>7s} {'backend':>9s} {'blocks':>8s} {'dense ms':>9s} {'f':>6s} {'d':>6s} "
    head += (
        f"{'ms':>9s} {'x':>6s} {'ceiling':>8s} {'of it':>6s} {'plan ms':>9s} {'peak':>6s} {'x peak':>6s} {'whole':>6s} "
    )
    lines = [head + f"{'gate':>8s}"]
    for case in record["cases"]:
        layers = "+".join(map(str, case["layers"]))
        for method, row in case["methods"].items():
            gate = case["gate"][method]
            lines.append(
                f"{case['name']:26s}{layers:>9s} {method:>7s} {row['backend']:>9s} {row['blocks']:>8s} "
                f"{case['dense_ms']:9.1f} {case['attention_share']:6.3f} {row['density']:6.3f} {row['step_ms']:9.1f} "
                f"{row['speedup']:6.2f} {row['ceiling']:8.2f} {row['of_ceiling']:6.3f} {row['planning_step_ms']:9.1f} "
                f"{row['peak_gib']:6.1f} {row['peak_ratio']:6.3f} {row['whole_peak_ratio']:6.3f} "
                + (f"{gate['kept']:8.1e}" if "kept" in gate else f"{'none':>8s}")
            )
    for case in record["cases"]:
        for method, row in case["methods"].items():
            if "of_dense_in_turns" in row:
                lines.append(
                    f"{case['name']}, in turns with dense steps: {method} {row['of_dense_in_turns']:.4f} of dense"
                )
    lines += [f"not measured, or not all of it: {name}" for name in record["failed"]]
    return "\n".join(lines)


def _missing(names: list[str], records: list[dict[str, Any]]) -> list[str]:
    """Models that were not gone through to the end."""
    complete = {found["case"] for found in records if found["complete"]}
    return [name for name in names if name not in complete]


def _prepare(names: list[str], args: argparse.Namespace) -> int:
    """Compile only."""
    missing = _missing(names, measure_all(commands(names, args), args.deadline, lambda _: None))
    sys.stdout.write("".join(f"not prepared, or not all of it: {name}\n" for name in missing))
    return 1 if missing else 0


def main() -> int:
    """Run what was asked for."""
    args = options()
    if args.no_self_test:
        backends.self_test = _untested  # type: ignore[assignment]
    if args.worker is not None:
        worker(args)
        return 0
    if args.gpus > 1:
        from _e2e_gpus import main as on_several

        return on_several(args)
    names = args.cases or (list(TOY) if args.toy else list(CASES))
    unknown = [name for name in names if name.removesuffix(_WHOLE) not in {**CASES, **TOY}]
    if unknown:
        raise ValueError(f"--cases must be of {', '.join({**CASES, **TOY})}, got {', '.join(unknown)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers are ended too
    device = torch.device("cuda" if torch.cuda.is_available() and not args.toy else "cpu")
    record: dict[str, Any] = {**environment(device), "density": args.density, "plans": PLANS}
    part = args.out.with_suffix(".part.json")

    def keep(found: list[dict[str, Any]]) -> None:
        write_whole(part, (json.dumps({**record, "cases": found}, indent=1) + "\n").encode())

    if args.prepare:
        return _prepare(names, args)
    records = measure_all(commands(names, args), args.deadline, keep)
    record |= {"failed": _missing(names, records), "cases": records}
    write(args.out, record)
    part.unlink(missing_ok=True)
    sys.stdout.write(table(record) + "\n")
    return 1 if record["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
