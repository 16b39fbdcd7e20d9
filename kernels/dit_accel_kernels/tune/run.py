"""Tune all cases on a user's GPU, and keep what is faster than the shipped shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .measure import Case, Outcome, tune_case
from .store import cache_file, forget, measured_tiles, write_tiles

__all__ = ["DEFAULT_CASES", "Case", "Outcome", "tune"]

#: Blocks of the presets, and those of the Hopper kernel, for the head sizes of today's models.
DEFAULT_CASES = tuple(
    Case(dim, torch.bfloat16, *blocks) for dim in (64, 128) for blocks in ((64, 64), (128, 64), (128, 128))
)


def tune(
    cases: Sequence[Case] = DEFAULT_CASES,
    *,
    device: torch.device | str = "cuda",
    dry_run: bool = False,
    say: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> tuple[list[Outcome], Path]:
    """Measure candidates on a GPU and keep what is faster than the shipped shape.

    Entries of the file that this run did not measure stay.

    Args:
        cases: head sizes, types and block sizes to measure.
        device: a CUDA or ROCm device.
        dry_run: measure, but write nothing.
        say: told what is being done, line by line.
        options: for :func:`tune_case`; tests replace ``timer``, ``run`` and what is asked of the device.

    Returns:
        The outcomes, and the file that holds them, or would.

    Raises:
        ValueError: there is no such GPU, or no Triton.
    """
    gpu, triton, arch, limits = _describe(torch.device(device), options)
    path = cache_file(gpu, triton)
    outcomes = []
    for case in cases:
        say(f"{case} on {gpu}")
        outcomes.append(tune_case(case, torch.device(device), arch, say=say, **limits, **options))
    kept = {} if not path.is_file() else dict(measured_tiles(gpu, triton))
    for outcome in outcomes:
        kept.pop(outcome.entry().key, None)
        if outcome.best != outcome.default:
            kept[outcome.entry().key] = outcome.entry()
    if not dry_run:
        write_tiles(path, kept.values(), gpu=gpu, triton=triton)
        forget()
    return outcomes, path


def _describe(device: torch.device, options: dict[str, Any]) -> tuple[str, str, str, dict[str, Any]]:
    """Name, Triton's version, architecture and limits of a GPU; ``options["machine"]`` stands in for it in tests."""
    machine = options.pop("machine", None)
    if machine is not None:
        return machine["gpu"], machine["triton"], machine["arch"], {k: machine[k] for k in ("shared_limit", "tma")}
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(f"tuning needs a GPU that torch sees, got device {device}")
    try:
        import triton
    except ImportError:
        raise ValueError("tuning needs triton, which is not installed") from None
    from ..block_sparse.launch import gpu_arch

    arch = gpu_arch(device)
    found = torch.cuda.get_device_properties(device)
    limit = int(getattr(found, "shared_memory_per_block_optin", 0)) or 65536
    number = int(arch[3:]) if arch.startswith("sm_") else 0
    return found.name, triton.__version__, arch, {"shared_limit": limit, "tma": number >= 90}
