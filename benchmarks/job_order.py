"""When the last program of the Hopper kernel ends, by how jobs are sorted and how early they are claimed: no GPU needed.

``PYTHONPATH=.:kernels python benchmarks/job_order.py`` prints, for rows of very unequal length, the rate that the order of
jobs alone allows, over that of equal rows: no memory, no clock, a job takes its tiles and ``--border`` more. A program
that claims ``--ahead`` jobs before it begins them keeps them while others are idle.
"""

from __future__ import annotations

import argparse
import heapq
import sys
from collections import deque

import numpy as np

__all__ = ["lengths", "sorted_in_groups", "time_of_last"]

PROGRAMS = 132
SHAPES = {"H12 S32768": (12, 256), "H24 S16896": (24, 132), "H40 S75648": (40, 591)}


def lengths(heads: int, blocks: int, density: float, uneven: bool, seed: int = 0) -> np.ndarray:
    """Blocks in the list of each query block ``[heads * blocks]``: equal, or exponential as in ``hopper.make``."""
    keep = np.full(heads * blocks, max(1.0, round(density * blocks)))
    if uneven:
        keep = np.clip(np.round(keep * np.random.default_rng(seed).exponential(size=keep.shape)), 1, blocks)
    return keep


def sorted_in_groups(keep: np.ndarray, blocks: int, rounds: float) -> np.ndarray:
    """Lengths in the order in which jobs are begun: longest first in groups of heads of about ``rounds`` rounds."""
    if not rounds:
        return keep
    span = max(1, round(rounds * PROGRAMS / blocks)) * blocks
    group = (len(keep) - 1 - np.arange(len(keep))) // span
    return keep[np.lexsort((-keep, -group))]


def time_of_last(cost: np.ndarray, ahead: int) -> float:
    """When the last program ends, if each claims ``ahead`` jobs before it begins them; 0 claims when it is idle."""
    queue = deque(cost)
    mine = [deque(queue.popleft() for _ in range(min(1, len(queue)))) for _ in range(PROGRAMS)]
    for _ in range(max(ahead - 1, 0)):
        for waiting in mine:
            if queue:
                waiting.append(queue.popleft())
    events, last = [(0.0, program) for program in range(PROGRAMS)], 0.0
    while events:
        now, program = heapq.heappop(events)
        waiting = mine[program]
        if not waiting and queue:
            waiting.append(queue.popleft())
        if not waiting:
            last = max(last, now)
            continue
        job = waiting.popleft()
        if ahead and queue:  # a job begins: one more is claimed
            waiting.append(queue.popleft())
        heapq.heappush(events, (now + job, program))
    return last


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=float, nargs="*", default=[0, 2, 4, 6, 8, 1000])
    parser.add_argument("--ahead", type=int, nargs="*", default=[2, 1, 0])
    parser.add_argument("--densities", type=float, nargs="*", default=[0.25, 0.1])
    parser.add_argument("--border", type=float, default=1.3, help="tiles that the border of two jobs takes")
    args = parser.parse_args(argv)
    sys.stdout.write(f"{'rounds in a group':<24}" + "".join(f"{r:>8g}" for r in args.rounds) + "\n")
    for name, (heads, blocks) in SHAPES.items():
        for density in args.densities:
            equal, keep = (lengths(heads, blocks, density, uneven) for uneven in (False, True))
            base = time_of_last(equal + args.border, 0) / equal.sum()
            for ahead in args.ahead:
                rates = [
                    base * keep.sum() / time_of_last(sorted_in_groups(keep, blocks, r) + args.border, ahead)
                    for r in args.rounds
                ]
                label = f"{name} {density:g}, {ahead} ahead"
                sys.stdout.write(f"{label:<24}" + "".join(f"{rate:>8.3f}" for rate in rates) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
