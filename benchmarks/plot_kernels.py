"""Rate against density and against length, from the committed records: ``python benchmarks/plot_kernels.py``.

Rates are those of visited pairs over the rate of dense cuDNN attention in the same run, so that machines and clocks cancel;
1 means that the speed-up over dense is the inverse of the density.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
ROOT = HERE.parent
CUDNN, SHAPE = "cuDNN dense", "H12 S32768 d128"
Points = dict[str, dict[float, float]]


def hopper_rates(record: Path) -> dict[tuple[str, str], dict[str, float]]:
    """Rates over cuDNN's of every kernel, by shape and case, of the run that holds what ships."""
    rows: list[dict[str, Any]] = json.loads(record.read_text(encoding="utf-8"))["runs"][0]["rows"]
    dense = {(row["shape"], row["case"]): row["tflops"] for row in rows if row["what"] == CUDNN}
    found: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in rows:
        place = row["shape"], row["case"]
        if place in dense:
            found[place][row["what"]] = row["tflops"] / dense[place]
    return found


def older_rates(table: Path, shape: str) -> Points:
    """The Triton kernel with blocks of 128 x 64 and FlexAttention, of the last run in ``results.csv`` that has both."""
    with table.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["shape"] == f"B1 {shape} 128x64"]
    runs: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        runs[row["date"]].append(row)
    for date in sorted(runs, reverse=True):
        cudnn = [float(r["tflops"]) for r in runs[date] if (r["name"], r["backend"]) == ("dense", "cudnn")]
        points: Points = {"triton": {}, "FlexAttention": {}}
        for row in runs[date]:
            name = {"ours": "triton", "flex": "FlexAttention"}.get(row["backend"])
            if row["name"] == "sparse" and name and cudnn:
                points[name][float(row["density"])] = float(row["tflops"]) / cudnn[0]
        if all(points.values()):
            return points
    return {}


def by_density(record: Path, table: Path) -> Points:
    """Curves over density at one shape."""
    points: Points = {"hopper": {}, "hopper, uneven rows": {}}
    for (shape, case), rates in hopper_rates(record).items():
        found = re.fullmatch(r"([\d.]+)( uneven)?", case)
        if shape == SHAPE and found and "hopper" in rates:
            points["hopper, uneven rows" if found[2] else "hopper"][float(found[1])] = rates["hopper"]
    return points | older_rates(table, SHAPE)


def by_length(record: Path) -> Points:
    """Curves over length at head size 128; short calls are eight in a CUDA graph."""
    points: Points = defaultdict(dict)
    for (shape, case), rates in hopper_rates(record).items():
        place, found = re.search(r"S(\d+) d128", shape), re.fullmatch(r"([\d.]+)( graph)?", case)
        rate = rates.get("hopper default", rates.get("hopper"))
        if place and found and rate is not None:
            points[f"density {found[1]}"][float(place[1])] = rate
    return {name: line for name, line in points.items() if len(line) > 1}


def draw(axes: Any, points: Points, title: str, label: str) -> None:
    """One panel."""
    for (name, line), marker in zip(points.items(), "osv^D<>"):
        places = sorted(line)
        axes.plot(places, [line[x] for x in places], marker=marker, markersize=5, label=name)
    axes.axhline(1.0, color="0.5", linewidth=0.8, linestyle="--")
    axes.set_xscale("log", base=2)
    ticks = sorted({x for line in points.values() for x in line})
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.4)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(label)
    axes.legend(fontsize=8, frameon=False, loc="lower right")


def main() -> None:
    """Draw both panels into one file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "assets" / "kernel_rates.svg")
    args = parser.parse_args()
    # The last record with all lengths was taken before jobs were claimed late, which equal rows do not notice.
    record, lengths = HERE / "results" / "hopper_late.json", HERE / "results" / "hopper_groups.json"
    table = HERE / "results.csv"
    plt.rcParams["svg.hashsalt"] = "dit_accel"  # the same file each time
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    draw(left, by_density(record, table), f"{SHAPE}, bf16, one H200", "density")
    draw(right, by_length(lengths), "head size 128, bf16, one H200", "tokens")
    left.set_ylabel("rate / rate of dense cuDNN")
    figure.savefig(args.out, metadata={"Date": None})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
