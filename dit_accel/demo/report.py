"""What the demo writes and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["SCHEMA_VERSION", "print_result", "write_clips", "write_maps"]

SCHEMA_VERSION = 1
_FPS = 16
_GAIN = 4
_HEADS = 4
_WIDEST = 1200


def write_clips(out: Path, dense: Any, fast: Any, label: str) -> list[str]:
    """Write the clips by themselves and side by side; the names of the files."""
    from dit_accel_eval.video import amplified_difference, side_by_side, write_clip

    width = dense.shape[2]
    panels = [("dense", dense), (label, fast), (f"difference x {_GAIN}", amplified_difference(fast, dense, _GAIN))]
    sheet = side_by_side(panels, scale=max(1, _WIDEST // (3 * width)))
    files = {"dense.mp4": dense, "accelerated.mp4": fast, "comparison.mp4": sheet, "comparison.webp": sheet}
    for name, clip in files.items():
        write_clip(out / name, clip, fps=_FPS)
    return list(files)


def write_maps(out: Path, maps: list[Any], method: str) -> list[str]:
    """Draw a few heads, evenly from the best to the worst kept; the names of the files."""
    from dit_accel_eval.maps import draw_maps, evenly_ranked

    if not maps:
        return []
    title = f"{method}: heads at the first sparse step, from the most to the least softmax mass kept"
    draw_maps(out / "attention.png", evenly_ranked(maps, _HEADS), title)
    return ["attention.png"]


def _reasons(result: dict[str, Any]) -> str:
    density = result["density"]
    lines = [f"{count} calls: {reason}" for reason, count in density["dense_calls"].items()]
    lines += [f"note: {note}" for note in density["notes"]]
    return "\n".join(lines) or "nothing did"


def print_result(console: Console, result: dict[str, Any], out: Path) -> None:
    """Print the table."""
    seconds, quality, density = result["seconds"], result["quality"], result["density"]
    table = Table(show_header=False, title="dense against accelerated", title_justify="left", title_style="bold")
    table.add_column(no_wrap=True)
    table.add_column()
    calls = f"{density['sparse_calls']} of {density['calls']} attention calls sparse at {density['sparse']:.3f}"
    rows = {
        "method": result["method"]["name"] + (f" ({result['calibration']})" if result["calibration"] else ""),
        "backend": result["backend"] or "none, nothing was sparse",
        "tokens": f"{result['tokens']} ({'x'.join(map(str, result['grid']))}), {result['settings']['steps']} steps",
        "density": f"{density['run']:.3f} of the dense work over the whole run, planning included; {calls}",
        "stayed dense": _reasons(result),
        "PSNR": f"{quality['psnr']:.2f} dB",
        "SSIM": f"{quality['ssim']:.4f}",
        "seconds dense": f"{seconds['dense']:.2f} denoising, {seconds['dense_decode']:.2f} decoding",
        "seconds accelerated": f"{seconds['accelerated']:.2f} denoising, {seconds['accelerated_decode']:.2f} decoding; "
        f"of it {seconds['planning']:.2f} planning",
        "speed-up": f"{result['speedup']:.2f} x (denoising loop; {result['not_timed']})",
        "files": f"{out}/: " + ", ".join(result["files"]),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
