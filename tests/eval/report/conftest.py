"""A folder of a run as `dit-accel eval` leaves it, made of small synthetic clips; and a driven browser."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

PROMPTS = (
    "red heart",
    "a rocket </script><script>alert(1)</script>",
    "butterfly & \"moth\" 'x' <b>bold</b> | `code`",
    "whale {{ 7*7 }} {% raw %}",
)
LAYERS, HEADS, STEPS = 4, 3, 8
Builder = Callable[..., Path]


class Kind(NamedTuple):
    method: str | None
    density: float
    noise: float
    seconds: float


ROWS = {
    "dense": Kind(None, 1.0, 0.0, 2.0),
    "another seed": Kind(None, 1.0, 0.35, 2.0),
    "auto 0.5": Kind("auto", 0.5, 0.01, 1.4),
    "auto 0.2": Kind("auto", 0.2, 0.03, 1.0),
    "adaspa 0.2": Kind("adaspa", 0.2, 0.06, 1.1),
}


def clip(index: int, frames: int, size: tuple[int, int], noise: float, seed: int) -> np.ndarray:
    """A disc that moves over a gradient; noise stands for the error of a method."""
    height, width = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    rng = np.random.default_rng(seed)
    made = []
    for t in range(frames):
        frame = np.stack([x / width, y / height, np.full_like(x, 0.2 + 0.15 * index)], -1)
        centre = (0.2 + 0.6 * t / max(frames - 1, 1)) * width
        disc = (x - centre) ** 2 + (y - height * (0.3 + 0.1 * index)) ** 2 < (height * 0.18) ** 2
        frame[disc] = (0.95, 0.5, 0.2)
        made.append(frame + noise * rng.standard_normal((height, width, 1)))
    return (np.clip(np.stack(made), 0, 1) * 255).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(((a.astype(np.float64) - b) ** 2).mean())
    return 100.0 if error == 0 else float(10 * np.log10(255**2 / error))


def _engine(kind: Kind, with_map: bool) -> dict[str, Any]:
    if kind.method is None:
        return {}

    def share(step: int, layer: int, head: int) -> float:
        return 1.0 if step < 2 else min(1.0, kind.density * (0.6 + 0.3 * head + 0.1 * layer))

    cube = [[[share(s, i, h) for h in range(HEADS)] for i in range(LAYERS)] for s in range(STEPS)]
    cube[0][1] = []  # a layer that was not called at a step
    return {
        "density": (2 + 6 * kind.density) / 8,
        "sparse_density": kind.density,
        "backend": "cpu",
        "plan_work": 0.03,
        "plans": LAYERS,
        "cache_hits": LAYERS * 5,
        "density_by_step": {str(s): 1.0 if s < 2 else kind.density for s in range(STEPS)},
        "layers": [{"name": f"blocks.{i}.attn1", "sparse": 6, "dense": {"warm-up": 2}} for i in range(LAYERS)],
        "reasons": {"warm-up": 2 * LAYERS, "planning step": LAYERS},
        "notes": ["a <note> of the engine"] if kind.density < 0.3 else [],
        "density_map": {"steps": list(range(STEPS)), "values": cube} if with_map else None,
    }


def _record(name: str, index: int, prompt: str, metrics: dict[str, Any], error: str | None) -> dict[str, Any]:
    kind = ROWS[name]
    speed = {"denoise_s": kind.seconds, "plan_ms": 12.5, "encode_s": 0.1, "decode_s": 0.2, "peak_bytes": None}
    return {
        "version": 1,
        "name": name,
        "prompt": prompt,
        "prompt_index": index,
        "seed": 0,
        "metrics": {} if error else metrics,
        "vbench": {},
        "engine": {} if error else _engine(kind, index == 0),
        "speed": {} if error else {**speed, "step_ms": [1.0] * STEPS},
        "notes": ["lpips_alex is nan"] if index == 3 and not error else [],
        "error": error,
    }


def _settings(names: Sequence[str], prompts: Sequence[str], frames: int, size: tuple[int, int]) -> dict[str, Any]:
    rows = [
        {
            "name": name,
            "method": ROWS[name].method,
            "options": {"run_density": ROWS[name].density} if ROWS[name].method else {},
            "labels": {"method": ROWS[name].method, "target": ROWS[name].density},
            "seed_offset": 1000 if name == "another seed" else 0,
        }
        for name in names
        if name != "dense"
    ]
    return {
        "version": 1,
        "command": "dit-accel eval --pipeline examples/tiny_wan --method auto,adaspa --out 'a <b>'",
        "pipeline": {"id": "examples/tiny_wan", "class": "WanPipeline", "digest": "0123abcd"},
        "prompts": list(prompts),
        "seeds": [0],
        "configurations": rows,
        "call": {"num_frames": frames, "num_inference_steps": STEPS, "height": size[0], "width": size[1]},
        "metrics": ["psnr", "ssim", "lpips_alex"],
        "profile": "offline",
        "environment": {"python": "3.11", "versions": {"torch": "2.13", "triton": None}, "gpus": []},
    }


def _results(names: Sequence[str], count: int) -> dict[str, Any]:
    rows = [
        {
            "name": name,
            "method": ROWS[name].method,
            "samples": count,
            "metrics": {"psnr": {"mean": 30.0, "std": 1.0, "ci95": 0.8}},
            "distribution": {"kid": {"mean": 0.01, "std": 0.002}},
            "vbench": {"temporal_flickering": {"mean": 0.97, "std": 0.01, "ci95": 0.01}},
            "speed": {"denoise_s": {"median": 1.2, "min": 1.1, "max": 1.3}, "peak_bytes": None},
        }
        for name in names
    ]
    numbers = {"rel_l1": 0.1, "cosine": 0.99, "recall": 0.9, "density": 0.2}
    for row in rows:
        if row["method"]:
            row["attention"] = {
                **numbers,
                "calls": 3,
                "by_layer": [{"name": "blocks.0.attn1", **numbers}],
                "by_step": {},
            }
    return {"version": 1, "rows": rows, "extractors": {"lpips-alex": "ab" * 32, "other": None}}


def _samples(
    folder: Path, name: str, index: int, prompt: str, frames: int, size: tuple[int, int], error: str | None
) -> None:
    """Record and raw frames of one sample."""
    kind = ROWS[name]
    place = folder / "samples" / re.sub(r"[^a-z0-9.]+", "-", name)
    place.mkdir(parents=True, exist_ok=True)
    dense = clip(index, frames, size, 0.0, 0)
    made = clip(index, frames, size, kind.noise * (1 + 0.4 * index), index)
    metrics: dict[str, Any] = {}
    if name != "dense":
        lpips = None if index == 3 else kind.noise
        metrics = {"psnr": psnr(made, dense), "ssim": 1 - kind.noise, "lpips_alex": lpips}
    (place / f"{index:04d}_0.json").write_text(json.dumps(_record(name, index, prompt, metrics, error)))
    if error is None:
        np.savez_compressed(place / f"{index:04d}_0.npz", frames=made)


@pytest.fixture(scope="session")
def build_run() -> Builder:
    """Write the folder of a run; see the arguments for what can be left out or broken."""

    def build(
        folder: Path,
        *,
        prompts: Sequence[str] = PROMPTS,
        frames: int = 9,
        size: tuple[int, int] = (48, 64),
        rows: Sequence[str] = tuple(ROWS),
        missing: tuple[tuple[str, int], ...] = (),
        errors: tuple[tuple[str, int], ...] = (),
        results: bool = True,
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps(_settings(rows, prompts, frames, size)))
        for name in rows:
            for index, prompt in enumerate(prompts):
                if (name, index) not in missing:
                    error = "RuntimeError: out of memory <now>" if (name, index) in errors else None
                    _samples(folder, name, index, prompt, frames, size, error)
        if results:
            (folder / "results.json").write_text(json.dumps(_results(rows, len(prompts))))
        return folder

    return build


def _browser_fixtures() -> tuple[Any, Any, Any]:
    """Those of browser.py: with importlib mode, test folders cannot import each other."""
    spec = importlib.util.spec_from_file_location("driven_browser", Path(__file__).parents[1] / "report" / "browser.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.browser, module.open_page, module.until


browser, open_page, until = _browser_fixtures()
