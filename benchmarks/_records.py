"""Records of measurements: one JSON line a shape, with what a number depends on, appended as it is measured."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from _timing import environment

from dit_accel_eval.files import append_record

__all__ = ["append"]


def append(path: Path | None, shape: str, dense_ms: float, rows: list[dict[str, Any]], **settings: Any) -> None:
    """Append what was measured on one shape; nothing without a path.

    Where a copy of the repository runs, ``DIT_ACCEL_COMMIT`` says which commit it is of.

    Args:
        path: a file of JSON lines.
        shape: heads, tokens and head size, as the script names them.
        dense_ms: milliseconds of dense cuDNN attention of the shape.
        rows: what was measured, each with ``part``, ``ms`` and ``of_dense``.
        **settings: what else was chosen.
    """
    if path is None:
        return
    where = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    where["commit"] = os.environ.get("DIT_ACCEL_COMMIT") or where["commit"]
    given = [word for i, word in enumerate(sys.argv[1:], 1) if "--out" not in sys.argv[i - 1 : i + 1]]
    command = " ".join([Path(sys.argv[0]).name, *given])
    path.parent.mkdir(parents=True, exist_ok=True)
    append_record(path, {**where, "command": command, "shape": shape, "dense_ms": dense_ms, **settings, "rows": rows})
