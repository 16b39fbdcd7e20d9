"""Files that are whole or absent: written beside their place and moved there; lists of records as JSON lines."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["append_record", "read_records", "remove_leftovers", "replacing", "write_json", "write_text"]

_TEMPORARY = ".tmp-"


@contextmanager
def replacing(path: str | Path, *, owner: str = "any") -> Iterator[Path]:
    """Give a temporary name with the suffix of ``path``; it takes the place of ``path`` if the block succeeds.

    Args:
        path: the file to be.
        owner: who writes it, part of the temporary name; see :func:`remove_leftovers`.
    """
    path = Path(path)
    prefix = f"{_TEMPORARY}{owner}-{path.stem}-"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:  # the data before the name, so that a power cut leaves no empty file
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: str | Path, owner: str = "any") -> int:
    """Remove what killed processes of ``owner`` left of :func:`replacing`, in ``folder`` and below; how many."""
    found = [path for path in Path(folder).rglob(f"{_TEMPORARY}{owner}-*") if path.is_file()]
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)


def write_text(path: str | Path, text: str, *, owner: str = "any") -> None:
    """Write text atomically."""
    with replacing(path, owner=owner) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, data: Any, *, owner: str = "any") -> None:
    """Write JSON atomically. NaN and infinity are refused, since JSON has none."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", owner=owner)


def append_record(path: str | Path, record: dict[str, Any]) -> None:
    """Append one JSON line with a single write, after ending a line that a killed process left open."""
    line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(handle).st_size
        if size:
            os.lseek(handle, size - 1, os.SEEK_SET)
            if os.read(handle, 1) != b"\n":
                line = b"\n" + line
        os.write(handle, line)
        os.fsync(handle)
    finally:
        os.close(handle)


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Read JSON lines; a line that was cut short is left out. No file is no records."""
    path = Path(path)
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
