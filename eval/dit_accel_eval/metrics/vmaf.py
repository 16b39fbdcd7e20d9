"""VMAF through ffmpeg's libvmaf, on raw frames handed over as they are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from dit_accel_eval.metrics.frames import as_pair, as_uint8

__all__ = ["EXTRACTOR", "MIN_SIDE", "missing", "vmaf"]

#: libvmaf's built-in default model.
EXTRACTOR = "vmaf_v0.6.1"
#: Its coarsest scale is an eighth of the frame.
MIN_SIDE = 64
_SECONDS = 900


def _candidates() -> list[str]:
    """``IMAGEIO_FFMPEG_EXE``, the ffmpeg that imageio-ffmpeg brings, and the one on the path."""
    found = [os.environ.get("IMAGEIO_FFMPEG_EXE"), None, shutil.which("ffmpeg")]
    try:
        import imageio_ffmpeg

        found[1] = imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        pass
    return [exe for exe in found if exe]


@lru_cache(maxsize=1)
def _ffmpeg() -> tuple[str | None, str]:
    """An ffmpeg with libvmaf, or why there is none."""
    tried = []
    for exe in _candidates():
        command = [exe, "-hide_banner", "-filters"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except OSError as error:
            tried.append(f"{exe} ({error.strerror})")
            continue
        if " libvmaf " in done.stdout:
            return exe, ""
        tried.append(exe)
    if not tried:
        return None, "no ffmpeg was found; install imageio-ffmpeg, whose build has libvmaf"
    return None, f"no ffmpeg with libvmaf among {', '.join(tried)}; install imageio-ffmpeg>=0.6"


def missing() -> str | None:
    """Why it cannot be used here, ``None`` if it can."""
    exe, reason = _ffmpeg()
    return None if exe else reason


def vmaf(clip: Any, reference: Any) -> float:
    """VMAF of a clip against its reference, 0 to 100, mean over frames.

    Raises:
        ValueError: clips that do not fit, or no ffmpeg with libvmaf.
        RuntimeError: ffmpeg failed; the message holds what it said.
    """
    a, b = as_pair(clip, reference)
    exe, reason = _ffmpeg()
    if exe is None:
        raise ValueError(f"VMAF cannot be used: {reason}")
    with tempfile.TemporaryDirectory(prefix="dit-accel-vmaf-") as folder:
        for name, frames in (("clip", a), ("reference", b)):
            (Path(folder) / name).write_bytes(as_uint8(frames).tobytes())
        return _run(exe, folder, f"{a.shape[2]}x{a.shape[1]}")


def _run(exe: str, folder: str, size: str) -> float:
    raw = ["-f", "rawvideo", "-pixel_format", "rgb24", "-video_size", size, "-framerate", "25"]
    # VMAF reads luminance only; 4:4:4 takes odd sizes, too.
    luma = "format=yuv444p,setpts=PTS-STARTPTS"
    graph = f"[0:v]{luma}[a];[1:v]{luma}[b];[a][b]libvmaf=log_fmt=json:log_path=log.json:n_threads=1"
    command = [exe, "-nostdin", "-loglevel", "error", *raw, "-i", "clip", *raw, "-i", "reference", "-lavfi", graph]
    done = subprocess.run(
        [*command, "-f", "null", "-"], cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False
    )
    log = Path(folder) / "log.json"
    if done.returncode != 0 or not log.is_file():
        raise RuntimeError(f"ffmpeg could not compute VMAF (exit {done.returncode}): {done.stderr.strip()[-400:]}")
    return float(json.loads(log.read_text(encoding="utf-8"))["pooled_metrics"]["vmaf"]["mean"])
