"""Pack animated emoji into one small archive, and read it back.

    python data.py --anim DIR [DIR ...] --names emoji.json --out clips.zip

`DIR` is an unpacked npm package `@lobehub/fluent-emoji-anim-1..4@1.0.0` and `emoji.json` comes with
npm `emoji-datasource-google@16.0.0`. The archive holds one WebP strip a clip (all frames of one loop
side by side, 128 x 128 each, on white) and `index.json`. It is for training only: the pictures are
not ours, so the archive must not be committed or passed on.
"""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from concepts import wanted
from PIL import Image

SIZE = 128
#: A WebP picture is at most 16,383 wide.
MAX_FRAMES = 96


@dataclass(frozen=True)
class Clip:
    """One loop of one concept: `frames` is uint8 (time, height, width, 3)."""

    prompt: str
    frames: np.ndarray


def read_animation(path: Path, size: int = SIZE) -> np.ndarray:
    """Read every frame of an animated picture, on white."""
    picture = Image.open(path)
    frames = []
    for index in range(min(getattr(picture, "n_frames", 1), MAX_FRAMES)):
        picture.seek(index)
        frame = picture.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
        white = Image.new("RGBA", frame.size, (255, 255, 255, 255))
        white.alpha_composite(frame)
        frames.append(np.asarray(white.convert("RGB")))
    return np.stack(frames)


def to_strip(frames: np.ndarray, quality: int) -> bytes:
    """Lay the frames side by side and compress them."""
    time, height, width, _ = frames.shape
    strip = Image.fromarray(frames.transpose(1, 0, 2, 3).reshape(height, time * width, 3))
    buffer = io.BytesIO()
    strip.save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue()


def from_strip(data: bytes) -> np.ndarray:
    """Undo `to_strip`."""
    strip = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    height, width, _ = strip.shape
    return np.ascontiguousarray(strip.reshape(height, width // height, height, 3).swapaxes(0, 1))


def find_files(folders: list[Path], names: Path) -> dict[str, Path]:
    """Find the file of every wanted concept; the key is its prompt."""
    stems: dict[str, str] = {}
    want = wanted()
    for entry in json.loads(names.read_text()):
        prompt = want.get(entry["name"].lower())
        if prompt is None:
            continue
        for code in (entry["unified"], entry.get("non_qualified") or entry["unified"]):
            stems[code.lower()] = prompt
            stems[code.lower().replace("-fe0f", "")] = prompt
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.webp")):
            prompt = stems.get(path.stem) or stems.get(path.stem.replace("-fe0f", ""))
            if prompt is not None:
                found[prompt] = path
    return dict(sorted(found.items()))


def _strip_of(path: Path, quality: int, least: int = 24) -> bytes | None:
    frames = read_animation(path)
    return to_strip(frames, quality) if len(frames) >= least else None


def pack(folders: list[Path], names: Path, out: Path, quality: int, workers: int) -> list[str]:
    """Write the archive; return the prompts in it."""
    files = find_files(folders, names)
    with ProcessPoolExecutor(workers) as pool:
        strips = list(pool.map(partial(_strip_of, quality=quality), files.values()))
    kept = {prompt: strip for prompt, strip in zip(files, strips, strict=True) if strip is not None}
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("index.json", json.dumps(list(kept)))
        for index, strip in enumerate(kept.values()):
            archive.writestr(f"{index:04d}.webp", strip)
    return list(kept)


def load(path: Path, limit: int | None = None, workers: int = 8) -> list[Clip]:
    """Read the archive back, decoding clips in parallel."""
    with zipfile.ZipFile(path) as archive:
        prompts = json.loads(archive.read("index.json"))[:limit]
        strips = [archive.read(f"{index:04d}.webp") for index in range(len(prompts))]
    with ThreadPoolExecutor(workers) as pool:
        frames = list(pool.map(from_strip, strips))
    return [Clip(prompt, clip) for prompt, clip in zip(prompts, frames, strict=True)]


def window(frames: np.ndarray, start: int, length: int) -> np.ndarray:
    """Cut `length` frames out of an endless loop, from frame `start` on."""
    return frames[(start + np.arange(length)) % len(frames)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--anim", type=Path, nargs="+", required=True)
    parser.add_argument("--names", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quality", type=int, default=92)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    prompts = pack(args.anim, args.names, args.out, args.quality, args.workers)
    missing = sorted(set(wanted().values()) - set(prompts))
    print(f"{len(prompts)} clips, {args.out.stat().st_size / 2**20:.1f} MiB; missing: {missing}")


if __name__ == "__main__":
    main()
