"""``dit-accel tune``: from the words of a command line to :func:`.run.tune`, and back to plain values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .measure import Case, Outcome
from .run import tune

__all__ = ["tune_command"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def tune_command(
    head_dims: Sequence[int],
    blocks: Sequence[str],
    dtype: str,
    *,
    dry_run: bool = False,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> tuple[list[dict[str, Any]], Path]:
    """Tune and describe the outcomes as JSON types.

    Args:
        head_dims: columns of a head, each a case.
        blocks: such as ``"128x64"``, queries x keys, each a case.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        dry_run: measure, but write nothing.
        say: told what is being done, line by line.
        options: for :func:`.run.tune`.

    Returns:
        One dictionary a case, and the file that holds them, or would.

    Raises:
        ValueError: a word is not understood, or there is no GPU or Triton.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    for dim in head_dims:
        if not 16 <= dim <= 256:
            raise ValueError(f"head_dim must be between 16 and 256, got {dim}")
    sizes = [_blocks(text) for text in blocks]
    cases = [Case(dim, _DTYPES[dtype], *size) for dim in head_dims for size in sizes]
    outcomes, path = tune(cases, dry_run=dry_run, say=say or (lambda _: None), **options)
    return [_plain(outcome) for outcome in outcomes], path


def _blocks(text: str) -> tuple[int, int]:
    rows, _, keys = text.partition("x")
    allowed = ("16", "32", "64", "128", "256")
    if rows not in allowed or keys not in allowed:
        raise ValueError(f"blocks must be QUERIESxKEYS of {', '.join(allowed)} tokens each, got {text!r}")
    return int(rows), int(keys)


def _plain(outcome: Outcome) -> dict[str, Any]:
    b = outcome.best
    shape = f"{b.block_m} x {b.block_n}, {b.num_warps} warps, {b.num_stages} stages{', descriptors' * b.tma}"
    return {
        "case": str(outcome.case),
        "default_ms": outcome.default_ms,
        "best_ms": outcome.best_ms,
        "gain": outcome.gain,
        "shape": shape,
        "tried": outcome.tried,
        "failed": outcome.failed,
    }
