"""Whether the metrics rank spoilt clips as they should: the tables of docs/metrics.md.

    python benchmarks/metric_ranking.py                                   # about ten minutes of one CPU core
    python benchmarks/metric_ranking.py --out benchmarks/results/metric_ranking

Three clips are spoilt in known ways and measured against themselves: a pan over a photograph, one that is drawn here,
and one that the tiny Wan made. "Another seed" is another photograph, drawing or seed. Every row is printed with all
metrics that this machine has, and every expectation that does not hold. Weights come from `dit-accel eval setup`; what is
missing is named and left out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "kernels", "patches", "eval")]

from dit_accel.env import versions  # noqa: E402
from dit_accel_eval import metrics, vbench  # noqa: E402
from dit_accel_eval.files import write_json, write_text  # noqa: E402

Frames = npt.NDArray[np.uint8]
Table = dict[str, dict[str, float]]
FPS = 16.0
ALIKE = 2e-4  # relative difference below which two values count as equal


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples/tiny_wan")
    parser.add_argument("--prompt", default="octopus")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--drawn-only", action="store_true", help="leave the model out")
    parser.add_argument("--out", type=Path, default=Path("metric_ranking"), help="written as .json and .md")
    return parser.parse_args()


def drawn_clip(frames: int = 5, side: int = 192, seed: int = 0) -> Frames:
    """Discs of several colours that cross a textured ground at their own speeds."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side].astype(float)
    ground = sum(
        rng.uniform(4, 12) * np.sin(rng.uniform(0.02, 0.6) * x + rng.uniform(0.02, 0.6) * y + rng.uniform(0, 6))
        for _ in range(12)
    )
    clip = np.repeat((120 + ground)[None, :, :, None], frames, axis=0).repeat(3, axis=3)
    for _ in range(6):
        centre, speed = rng.uniform(0, side, 2), rng.uniform(-9, 9, 2)
        radius, colour = rng.uniform(12, 34), rng.uniform(0, 255, 3)
        for index in range(frames):
            left, top = (centre + speed * index) % side
            edge = np.clip(radius - np.hypot(x - left, y - top), 0, 1)[..., None]
            clip[index] = clip[index] * (1 - edge) + colour * edge
    return clip.clip(0, 255).round().astype(np.uint8)


def photo_clip(frames: int = 5, side: int = 192, seed: int = 0) -> Frames:
    """A camera that pans over a photograph of scikit-image."""
    from skimage import data

    picture = data.astronaut() if seed == 0 else data.coffee()
    lefts = (40 + 7 * index for index in range(frames))
    return np.stack([picture[30 + index : 30 + index + side, x : x + side] for index, x in enumerate(lefts)])


def model_clips(args: argparse.Namespace) -> tuple[Frames, Frames]:
    """A clip of the tiny Wan and one of the same prompt with another seed."""
    from dit_accel.demo.pipeline import load
    from dit_accel_eval.generate import generate

    pipe = load(args.model, torch.device("cpu"))
    call: dict[str, Any] = {"height": 128, "width": 128, "num_frames": 17, "guidance_scale": 4.0}
    made = generate(pipe, [args.prompt] * 2, [0, 1000], num_inference_steps=args.steps, **call).frames
    return made[0], made[1]


def spoilt(clip: Frames, other: Frames) -> dict[str, Frames]:
    """The clip and what became of it."""
    import cv2

    rng = np.random.default_rng(0)
    noise = rng.normal(size=clip.shape)
    sign = np.where(np.arange(len(clip)) % 2, 1, -1)[:, None, None, None]

    def fit(x: npt.NDArray[Any]) -> Frames:
        return np.clip(np.round(x), 0, 255).astype(np.uint8)

    rows = {"itself": clip}
    rows |= {f"noisy, sigma {s}": fit(clip + s * noise) for s in (5, 10, 20)}
    rows |= {f"blurred, sigma {s}": np.stack([cv2.GaussianBlur(f, (0, 0), s) for f in clip]) for s in (1, 2, 4)}
    rows |= {f"flickering, ±{s}": fit(clip + s * sign.astype(float)) for s in (10, 40)}
    rows["frozen"] = np.repeat(clip[:1], len(clip), axis=0)
    order = np.random.default_rng(1).permutation(len(clip))
    rows["shuffled"] = clip[order]
    rows["another seed"] = other
    return rows


def measure(clip: Frames, other: Frames) -> Table:
    """Paired metrics against the clip, then the dimensions of VBench's offline profile."""
    names = [name for name in metrics.REGISTRY if metrics.available(name) is None]
    table = {}
    for row, frames in spoilt(clip, other).items():
        start = time.perf_counter()
        table[row] = metrics.evaluate_pair(frames, clip, names) | vbench.evaluate(frames, fps=FPS)
        print(f"  {row}: {time.perf_counter() - start:.1f} s", flush=True)
    return table


def better(name: str, a: float, b: float) -> bool:
    """Whether ``a`` is clearly better than ``b``."""
    higher = metrics.REGISTRY[name].higher_is_better if name in metrics.REGISTRY else True
    gap = (a - b) if higher else (b - a)
    return gap > ALIKE * max(abs(a), abs(b), 1e-9)


Values = dict[str, float]
Check = tuple[str, str, Callable[[Values], bool]]
SIGNED = "flicker_difference"  # 0 is best, so it has no order
FLICKERING = ("itself", "flickering, ±10", "flickering, ±40")


def ordered(name: str, *rows: str) -> Callable[[Values], bool]:
    """Each row is clearly better than the next."""
    return lambda v: all(better(name, v[a], v[b]) for a, b in pairwise(rows))


def unbeaten(name: str) -> Callable[[Values], bool]:
    """No row is clearly better than the clip itself."""
    return lambda v: not any(better(name, value, v["itself"]) for value in v.values())


def paired_checks(rows: list[str]) -> Iterator[Check]:
    """What metrics against the reference should see."""
    for name in (n for n in metrics.REGISTRY if n != SIGNED):
        yield name, "nothing beats the clip itself", unbeaten(name)
    for name in (n for n in metrics.REGISTRY if n not in (SIGNED, "temporal_difference")):
        for kind in ("noisy", "blurred"):
            steps = [row for row in rows if row.startswith(kind)]
            yield name, f"falls with each step of {kind}", ordered(name, "itself", *steps)
    for name in ("psnr", "ssim", "lpips_alex", "lpips_vgg", "clip_drift"):
        yield name, "another seed is worse than mild noise", ordered(name, "noisy, sigma 5", "another seed")
    yield "temporal_difference", "falls with flickering", ordered("temporal_difference", *FLICKERING)
    for name in ("temporal_difference", "psnr"):
        for row in ("frozen", "shuffled"):
            yield name, f"sees {row}", ordered(name, "itself", row)
    yield SIGNED, "0 for the clip itself and above for frozen", lambda v: v["itself"] == 0 < v["frozen"]
    for row in ("flickering, ±40", "shuffled", "noisy, sigma 20"):
        yield SIGNED, f"below 0 for {row}", lambda v, row=row: v[row] < 0  # type: ignore[misc]


def vbench_checks() -> Iterator[Check]:
    """What dimensions without a reference should see, and where they are known to be blind."""
    for name in ("temporal_flickering", "motion_smoothness"):
        yield name, "falls with flickering", ordered(name, *FLICKERING)
    for name in ("temporal_flickering", "motion_smoothness", "subject_consistency"):
        for row in ("shuffled", "noisy, sigma 20"):
            yield name, f"{row} is worse", ordered(name, "itself", row)
    yield "subject_consistency", "frozen is perfect (VBench rewards it)", lambda v: v["frozen"] > 0.9999
    yield "temporal_flickering", "frozen is perfect (VBench rewards it)", lambda v: v["frozen"] == 1
    yield "dynamic_degree", "frozen does not move", lambda v: v["frozen"] == 0
    for row in ("noisy, sigma 20", "blurred, sigma 4"):
        yield "imaging_quality", f"{row} is worse", ordered("imaging_quality", "itself", row)


def expectations(table: Table) -> list[tuple[str, bool]]:
    """What should hold, and whether it does, for the metrics in the table."""
    found = []
    for name, text, holds in (*paired_checks(list(table)), *vbench_checks()):
        values = {row: line[name] for row, line in table.items() if name in line}
        if values:
            found.append((f"{name}: {text}", holds(values)))
    return found


def markdown(title: str, table: Table) -> str:
    """One table, metrics down and rows across."""
    names = list(dict.fromkeys(name for line in table.values() for name in line))
    rows = list(table)
    lines = [f"### {title}", "", "| metric | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for name in names:
        cells = [f"{table[row][name]:.4g}" if name in table[row] else "" for row in rows]
        higher = name not in metrics.REGISTRY or metrics.REGISTRY[name].higher_is_better
        arrow = "" if name == SIGNED else " ↑" if higher else " ↓"
        lines.append(f"| `{name}`{arrow} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    args = arguments()
    missing = {name: reason for name in metrics.REGISTRY if (reason := metrics.available(name))}
    missing |= {name: reason for name in vbench.DIMENSIONS if (reason := vbench.available(name))}
    for name, reason in missing.items():
        print(f"left out: {name}: {reason}")
    clips: dict[str, tuple[Frames, Frames]] = {
        "Photograph, panned, 5 frames of 192 × 192": (photo_clip(), photo_clip(seed=1)),
        "Drawn, 5 frames of 192 × 192": (drawn_clip(), drawn_clip(seed=1)),
    }
    if not args.drawn_only:
        title = f"Tiny Wan, “{args.prompt}”, {args.steps} steps, 17 frames of 128 × 128"
        clips[title] = model_clips(args)
    tables, verdicts = {}, {}
    for title, (clip, other) in clips.items():
        print(title, flush=True)
        tables[title] = measure(clip, other)
        verdicts[title] = expectations(tables[title])
    sections = [part for title in tables for part in (markdown(title, tables[title]), verdict(verdicts[title]))]
    text = "\n\n".join(["↑ higher is better, ↓ lower is better.", *sections]) + "\n"
    print(text)
    write_text(args.out.with_suffix(".md"), text)
    record = {"tables": tables, "expectations": verdicts, "missing": missing, "versions": versions()}
    write_json(args.out.with_suffix(".json"), record)
    return 0


def verdict(checks: list[tuple[str, bool]]) -> str:
    """How many expectations hold, and those that do not."""
    failed = [text for text, holds in checks if not holds]
    lines = [f"{len(checks) - len(failed)} of {len(checks)} expectations hold." + (" These do not:" if failed else "")]
    return "\n".join(lines + [f"- {text}" for text in failed])


if __name__ == "__main__":
    sys.exit(main())
