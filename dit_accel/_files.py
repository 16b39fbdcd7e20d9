"""Files that are whole or absent."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: str | Path, data: bytes) -> None:
    """Write ``data`` beside ``path`` and move it there, so that a reader sees the old file or the new one.

    Raises:
        OSError: if the folder cannot be written to; what was there stays.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).chmod(0o644)  # a temporary file is its owner's alone
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
