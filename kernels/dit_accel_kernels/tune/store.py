"""Tile shapes as data: the table that ships, and what a user has measured on one GPU with one release of Triton.

A table is JSON, ``{"format": "dit_accel.tiles", "version": 1, "entries": [...]}``. Entries of the shipped table hold for an
architecture, the largest padded head size and the bytes of an element; the first that fits counts. Entries of a measured
one hold for exactly one head size, type and pair of block sizes. Imports no triton and no torch.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

__all__ = ["TileEntry", "cache_file", "forget", "measured_tiles", "read_tiles", "shipped_tiles", "write_tiles"]

_FORMAT, _VERSION = "dit_accel.tiles", 1
_NUMBERS = ("head_dim", "itemsize", "block_m", "block_n", "num_warps", "num_stages")


@dataclass(frozen=True)
class TileEntry:
    """A tile shape and what it is for.

    Attributes:
        head_dim: columns of a head; in the shipped table the largest padded number of them.
        itemsize: bytes of an element.
        block_m: query rows of a program.
        block_n: keys of one step.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        tma: whether keys and values come through tensor descriptors.
        arch: architecture, for the shipped table.
        block_q: tokens of a query block, for a measured one.
        block_k: tokens of a key block, for a measured one.
        ms: milliseconds of the measured call.
        default_ms: milliseconds of the same call with the shipped shape.
    """

    head_dim: int
    itemsize: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    arch: str | None = None
    block_q: int | None = None
    block_k: int | None = None
    ms: float | None = None
    default_ms: float | None = None

    @property
    def key(self) -> tuple[int, int, int | None, int | None]:
        """What a measured entry is for."""
        return self.head_dim, self.itemsize, self.block_q, self.block_k


def read_tiles(path: Path) -> list[TileEntry]:
    """Read a table.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a table of this version, or an entry is broken; the message names the file.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable table of tiles: {error}") from None
    if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (_FORMAT, _VERSION):
        found = (data.get("format"), data.get("version")) if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path} must be {_FORMAT} version {_VERSION}, got {found}")
    entries = data.get("entries")
    if not isinstance(entries, list):
        raise ValueError(f"{path} must have a list of entries, got {type(entries).__name__}")
    return [_entry(path, raw) for raw in entries]


def _entry(path: Path, raw: Any) -> TileEntry:
    if not isinstance(raw, dict) or not all(type(raw.get(name)) is int and raw[name] > 0 for name in _NUMBERS):
        raise ValueError(f"{path}: an entry must have positive integers {', '.join(_NUMBERS)}, got {raw!r}")
    for name in ("block_m", "block_n", "num_warps"):
        if raw[name] & (raw[name] - 1):
            raise ValueError(f"{path}: {name} must be a power of two, got {raw[name]}")
    try:
        return TileEntry(**raw)
    except TypeError as error:
        raise ValueError(f"{path}: {error} in {raw!r}") from None


def write_tiles(path: Path, entries: Iterable[TileEntry], **about: str) -> None:
    """Write a table whole: to a file beside it that then takes its name.

    Args:
        path: where to; its folder is made.
        entries: in the order in which they are looked through.
        about: further fields, such as the GPU's name.
    """
    rows = [{name: value for name, value in asdict(e).items() if value is not None} for e in entries]
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    head = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in about.items())
    text = f'{{\n "format": "{_FORMAT}",\n "version": {_VERSION},\n{head} "entries": [\n{lines}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def cache_file(gpu: str, triton: str) -> Path:
    """Where the measured table of a GPU and a release of Triton is.

    ``DIT_ACCEL_CACHE`` names the folder; otherwise it is the user's cache folder of the system.

    Args:
        gpu: name of the GPU.
        triton: version of Triton.
    """
    name = "-".join(re.sub(r"[^a-z0-9.]+", "-", part.lower()).strip("-") for part in (gpu, triton))
    return _cache_folder() / f"tiles-{name}.json"


def _cache_folder() -> Path:
    if os.environ.get("DIT_ACCEL_CACHE"):
        return Path(os.environ["DIT_ACCEL_CACHE"])
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "dit_accel"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "dit_accel"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit_accel"


@lru_cache(maxsize=1)
def shipped_tiles() -> tuple[TileEntry, ...]:
    """The committed table."""
    return tuple(read_tiles(Path(__file__).with_name("tiles.json")))


@lru_cache(maxsize=16)
def measured_tiles(gpu: str, triton: str) -> dict[tuple[int, int, int | None, int | None], TileEntry]:
    """What was measured on this GPU, by :attr:`TileEntry.key`; nothing where nobody has, or the file is broken.

    A broken file is not worth an exception in somebody's generation: ``dit-accel tune`` replaces it.
    """
    try:
        return {entry.key: entry for entry in read_tiles(cache_file(gpu, triton))}
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home folder
        return {}


def forget() -> None:
    """Read measured tables again when they are next needed."""
    measured_tiles.cache_clear()
