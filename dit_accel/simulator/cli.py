"""``dit-accel simulate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command ``simulate`` to a command line."""
    app.command("simulate")(_simulate)


def _simulate(
    grid: Annotated[str, typer.Argument(help="Tokens along the axes, such as 30x48x80, 256x256 or 4096.")],
    window: Annotated[str, typer.Option(help="Tokens seen on each axis, such as 18x24x24; -1 is the whole axis.")],
    stride: Annotated[str, typer.Option(help="Queries that share a window, one number or one for each axis.")] = "1",
    dilation: Annotated[str, typer.Option(help="Distance of neighbouring keys.")] = "1",
    causal: Annotated[str, typer.Option(help="Causal axes, from frames, height, width, with commas.")] = "",
    tile: Annotated[str | None, typer.Option(help="Tokens of a tile (default: 4x4x4, 8x8 or 64).")] = None,
    tile_q: Annotated[str | None, typer.Option(help="Another tile for the queries.")] = None,
    tile_k: Annotated[str | None, typer.Option(help="Another tile for the keys.")] = None,
    order: Annotated[list[str] | None, typer.Option(help="Count runs of the sequence in this order too.")] = None,
    proposals: Annotated[
        int, typer.Option("--propose", help="Also propose this many windows without partial tiles.")
    ] = 0,
    query: Annotated[
        str | None, typer.Option(help="Brick of queries to show, such as 7x3x5 (default: the middle).")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Write a picture, .png or .svg; needs matplotlib.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a picture.")] = False,
) -> None:
    """Count the tiles that a neighbourhood window visits, and what it can gain at most."""
    from dit_accel.simulator import propose, simulate

    try:
        sizes = _sizes("grid", grid)
        names = _causal(causal, len(sizes))
        asked = (_sizes("window", window), _sizes("stride", stride))
        tiles = [None if t is None else _sizes("tile", t) for t in (tile, tile_q, tile_k)]
        found = simulate(
            sizes,
            *(_one_or_all(value) for value in (*asked, _sizes("dilation", dilation))),
            causal=names,
            tile=tiles[0],
            tile_q=tiles[1],
            tile_k=tiles[2],
        )
        counts = [found.brick, *(found.along(name) for name in order or ())]
        nearest = []
        if proposals:
            nearest = propose(sizes, *map(_one_or_all, asked), tile=tiles[0], limit=proposals)
        shown = None if query is None else _sizes("query", query)
        shown = None if shown is None else (*(0,) * (3 - len(shown)), *shown)
        if picture is not None:
            found.save(picture, shown)
        drawn = found.text(shown, Console().width)
    except (ValueError, ImportError) as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False, style="red")
        raise typer.Exit(2) from None
    console = Console()
    if as_json:
        data = found.to_dict()
        data["sequences"] = [
            {"tiling": c.tiling, "visited": c.visited, "full": c.full, "bound": c.bound} for c in counts[1:]
        ]
        data["proposals"] = [
            {"window": p.window, "stride": p.stride, "tile": p.tile, "bound": p.simulation.tile_bound} for p in nearest
        ]
        console.print_json(json.dumps(data))
        return
    console.print(drawn)
    table = Table(title="tilings", title_justify="left", title_style="bold")
    for column in ("tiling", "pairs", "visited", "full", "partial", "at most"):
        table.add_column(column, justify="left" if column == "tiling" else "right")
    for c in counts:
        table.add_row(c.tiling, *map(str, (c.pairs, c.visited, c.full, c.partial)), f"{c.bound:.2f}x")
    console.print(table)
    if proposals:
        console.print("without partial tiles:" if nearest else "no window near this one is without partial tiles")
    for proposal in nearest:
        console.print(f"  {proposal}", highlight=False)


def _sizes(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split("x"))
    except ValueError:
        raise ValueError(f"{name} must be numbers joined by 'x', such as 18x24x24, got {text!r}") from None


def _one_or_all(value: tuple[int, ...]) -> int | tuple[int, ...]:
    return value[0] if len(value) == 1 else value


def _causal(text: str, axes: int) -> tuple[bool, ...] | bool:
    names = ("frames", "height", "width")[3 - axes :]
    given = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in given if part not in names]
    if unknown:
        raise ValueError(f"causal axes of this grid are {', '.join(names)}, got {', '.join(unknown)}")
    return tuple(name in given for name in names) if given else False
