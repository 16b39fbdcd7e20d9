"""Pictures of a simulation: which bricks of keys one brick of queries visits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.text import Text
from torch import Tensor

from dit_accel.geometry import Grid

if TYPE_CHECKING:
    from dit_accel.simulator.simulation import Simulation

__all__ = ["key_map", "save_picture", "text_picture"]

#: Character and style of a key brick: skipped, full, partial, and full or partial at the place of the queries.
_SYMBOLS = {0: ("·", "bright_black"), 1: ("█", "green"), 2: ("▒", "yellow"), 3: ("Q", "bold white on green")}
_SKIPPED, _FULL, _PARTIAL, _QUERY = range(4)


def key_map(simulation: Simulation, query: Sequence[int] | None = None) -> tuple[Tensor, Grid]:
    """Bricks of keys as one brick of queries sees them.

    Args:
        simulation: what to look at.
        query: number of the brick along frames, height and width; the middle one if not given.

    Returns:
        uint8 ``[Tf, Th, Tw]``, 0 skipped, 1 full, 2 partial, 3 visited and at the place of the queries; and the brick.

    Raises:
        ValueError: there is no such brick.
    """
    counts = [len(tiles.visited) for tiles in simulation.axis_tiles]
    chosen = tuple(n // 2 for n in counts) if query is None else tuple(query)
    if len(chosen) != 3 or not all(0 <= place < n for place, n in zip(chosen, counts, strict=True)):
        raise ValueError(f"a brick of queries must lie in {'x'.join(map(str, counts))}, from 0, got {chosen}")
    rows = [(t.visited[i], t.full[i]) for t, i in zip(simulation.axis_tiles, chosen, strict=True)]
    visited, full = (_outer([row[part] for row in rows]) for part in (0, 1))
    found = torch.zeros(visited.shape, dtype=torch.uint8)
    found[visited] = _PARTIAL
    found[full] = _FULL
    if simulation.tile_q == simulation.tile_k and visited[chosen]:
        found[chosen] = _QUERY
    return found, (chosen[0], chosen[1], chosen[2])


def _outer(rows: Sequence[Tensor]) -> Tensor:
    return rows[0][:, None, None] & rows[1][None, :, None] & rows[2][None, None, :]


def text_picture(simulation: Simulation, query: Sequence[int] | None = None, width: int = 100) -> Text:
    """Numbers, and slices of bricks side by side, one slice for each brick of frames.

    Args:
        simulation: what to show.
        query: the brick of queries, see :func:`key_map`.
        width: columns of the terminal.
    """
    found, chosen = key_map(simulation, query)
    text = Text(f"{simulation}\n\n")
    text.append(f"bricks of keys that the brick of queries {'x'.join(map(str, chosen))} visits: ")
    for level, name in ((_QUERY, "itself "), (_FULL, "full "), (_PARTIAL, "partial "), (_SKIPPED, "skipped")):
        symbol, style = _SYMBOLS[level]
        text.append(symbol, style)
        text.append(f" {name}")
    text.append("\n")
    together = max(1, (width + 2) // (found.shape[2] + 2))
    for start in range(0, len(found), together):
        text.append("\n")
        for row in range(found.shape[1]):
            for place, part in enumerate(found[start : start + together, row]):
                text.append("  " if place else "")
                for level in part.tolist():
                    text.append(*_SYMBOLS[level])
            text.append("\n")
    return text


def save_picture(simulation: Simulation, path: Path, query: Sequence[int] | None = None) -> None:
    """The slices of :func:`text_picture` and the tile pairs of each axis, as PNG or SVG.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: another ending.
    """
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"a picture must end in .png or .svg, got {path.name!r}")
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib, or dit-accel[eval]") from error
    found, chosen = key_map(simulation, query)
    colors = ListedColormap(["#eeeeee", "#2a9d5c", "#e9c46a", "#1d3557"])
    columns = min(len(found), 8)
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(2 + 1.6 * columns, 3.4 + 1.5 * rows), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(2.4, 1.5 * rows + 0.4))
    slices = parts[1]
    _draw_axes(parts[0], simulation, colors)
    slices.suptitle(f"bricks of keys that query brick {chosen} visits, one slice for each brick of frames", fontsize=9)
    for place, plot in enumerate(slices.subplots(rows, columns, squeeze=False).flat):
        plot.set_axis_off()
        if place < len(found):
            plot.imshow(found[place].numpy(), cmap=colors, vmin=0, vmax=3)
            plot.set_title(str(place), fontsize=7)
    figure.savefig(path, dpi=150)


def _draw_axes(figure: Any, simulation: Simulation, colors: Any) -> None:
    figure.suptitle(str(simulation), fontsize=9)
    plots = figure.subplots(1, 3)
    for name, tiles, plot in zip(("frames", "height", "width"), simulation.axis_tiles, plots, strict=True):
        levels = torch.where(tiles.visited, _PARTIAL, _SKIPPED)
        levels[tiles.full] = _FULL
        plot.imshow(levels.numpy(), cmap=colors, vmin=0, vmax=3, interpolation="nearest")
        plot.set_title(name, fontsize=8)
        plot.set_xlabel("key bricks", fontsize=7)
        plot.set_ylabel("query bricks", fontsize=7)
        plot.tick_params(labelsize=6)
