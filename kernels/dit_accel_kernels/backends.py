"""Who computes block-sparse attention: names, reasons why not, self-tests and the choice.

One function, :func:`why_not`, feeds the choice, the log and the exception alike. A backend that could run is used only
after :func:`self_test` has seen it agree with the masked reference, on a mask that dense attention would fail.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .types import GatheredKeys

__all__ = [
    "BACKENDS",
    "Backend",
    "choose_backend",
    "register_backend",
    "require_backend",
    "run_backend",
    "self_test",
    "why_not",
]

_Run = Callable[..., tuple[Tensor, Tensor]]
_MAX_HEAD_DIM = 256
_TRITON_BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Backend:
    """An implementation of block-sparse attention.

    Attributes:
        name: what the user writes.
        why_not: reason why it cannot serve, or ``None``; called with ``device``, ``dtype``, ``head_dim``, ``block_q`` and
            ``block_k`` by keyword. It must be cheap and must not run a kernel.
        run: called with ``q, k, v, lists`` and the keywords ``scale``, ``order``, ``pooled``, ``windows``, ``key_valid``,
            ``gathered`` and ``return_lse``, of which all but ``scale`` and ``return_lse`` may be left out; returns the
            output and the log-sum-exp, the latter empty or not when it was not asked for.
        devices: device types for which it is chosen automatically.
    """

    name: str
    why_not: Callable[..., str | None]
    run: _Run
    devices: tuple[str, ...]


def _why_not_reference(**_: Any) -> str | None:
    return None


def _why_not_cpu(*, device: torch.device, dtype: torch.dtype, head_dim: int, **_: Any) -> str | None:
    if device.type != "cpu":
        return f"device must be cpu, got {device}"
    allowed = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    if dtype not in allowed:
        return f"dtype must be one of {allowed}, got {dtype}"
    return None


def _why_not_triton(
    *, device: torch.device, dtype: torch.dtype, head_dim: int, block_q: int, block_k: int
) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and not (interpreted and device.type == "cpu"):
        return f"device must be cuda (or cpu with TRITON_INTERPRET=1), got {device}"
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"compute capability must be at least 8.0, got {major}.{minor}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype must be bfloat16, float16 or float32, got {dtype}"
    if not 1 <= head_dim <= _MAX_HEAD_DIM:
        return f"head_dim must be at most {_MAX_HEAD_DIM}, got {head_dim}"
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size not in _TRITON_BLOCKS:
            return f"{name} must be one of {_TRITON_BLOCKS}, got {size}"
    return None


def _run_reference(*args: Any, return_lse: bool, **kwargs: Any) -> tuple[Tensor, Tensor]:
    from .block_sparse.reference import block_sparse_reference

    return block_sparse_reference(*args, **kwargs)


def _run_cpu(*args: Any, return_lse: bool, **kwargs: Any) -> tuple[Tensor, Tensor]:
    from .block_sparse.cpu import block_sparse_cpu

    return block_sparse_cpu(*args, **kwargs)


def _run_triton(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    from .block_sparse.launch import block_sparse_triton

    return block_sparse_triton(*args, **kwargs)


def _why_not_hopper(**kwargs: Any) -> str | None:
    if kwargs["block_q"] == 64:
        from .block_sparse.hopper_pairs_launch import why_not_pairs

        return why_not_pairs(**kwargs)
    from .block_sparse.hopper_launch import why_not_hopper

    return why_not_hopper(**kwargs)


def _run_hopper(*args: Any, gathered: GatheredKeys | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
    if args[3].block_q == 64:
        from .block_sparse.hopper_pairs_launch import run_pairs

        return run_pairs(*args, gathered=gathered, **kwargs)
    if gathered is not None:
        from .pyramid.hopper_launch import run_gathered

        return run_gathered(*args, gathered=gathered, **kwargs)
    from .block_sparse.hopper_launch import run_hopper

    return run_hopper(*args, **kwargs)


def _why_not_flex(**kwargs: Any) -> str | None:
    from .block_sparse.flex import why_not_flex

    return why_not_flex(**kwargs)


def _run_flex(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    from .block_sparse.flex import block_sparse_flex

    return block_sparse_flex(*args, **kwargs)


def _why_not_flash4(**kwargs: Any) -> str | None:
    from .block_sparse.flash4 import why_not_flash4

    return why_not_flash4(**kwargs)


def _run_flash4(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    from .block_sparse.flash4 import block_sparse_flash4

    return block_sparse_flash4(*args, **kwargs)


def _why_not_natten(**kwargs: Any) -> str | None:
    from .block_sparse.natten import why_not_natten

    return why_not_natten(**kwargs)


def _why_not_xformers(**kwargs: Any) -> str | None:
    from .block_sparse.xformers import why_not_xformers

    return why_not_xformers(**kwargs)


# In order of preference; those without devices are there to be asked for by name.
BACKENDS: dict[str, Backend] = {
    "hopper": Backend("hopper", _why_not_hopper, _run_hopper, ("cuda",)),
    "triton": Backend("triton", _why_not_triton, _run_triton, ("cuda",)),
    "cpu": Backend("cpu", _why_not_cpu, _run_cpu, ("cpu",)),
    "flex": Backend("flex", _why_not_flex, _run_flex, ()),
    "flash4": Backend("flash4", _why_not_flash4, _run_flash4, ()),
    # These two have reasons only: what they serve instead is in their modules.
    "natten": Backend("natten", _why_not_natten, _run_reference, ()),
    "xformers": Backend("xformers", _why_not_xformers, _run_reference, ()),
    "reference": Backend("reference", _why_not_reference, _run_reference, ("cuda", "cpu")),
}
_self_tests: dict[tuple[Any, ...], str | None] = {}
_choices: dict[tuple[Any, ...], tuple[str, dict[str, str]]] = {}


def register_backend(backend: Backend, *, first: bool = False) -> None:
    """Add a backend, or replace the one of that name.

    Args:
        backend: the implementation.
        first: prefer it to all others instead of to none but the reference.
    """
    others = {name: known for name, known in BACKENDS.items() if name != backend.name}
    reference = {"reference": others.pop("reference")} if "reference" in others else {}
    new = {backend.name: backend}
    merged = {**new, **others, **reference} if first else {**others, **new, **reference}
    BACKENDS.clear()
    BACKENDS.update(merged)
    _choices.clear()
    for key in [key for key in _self_tests if key[0] == backend.name]:
        del _self_tests[key]


def why_not(
    name: str, *, device: torch.device | str, dtype: torch.dtype, head_dim: int, block_q: int, block_k: int
) -> str | None:
    """Say why a backend cannot serve; runs no kernel.

    Args:
        name: the backend.
        device: where the tensors are.
        dtype: of queries, keys and values.
        head_dim: columns of a head.
        block_q: tokens in a query block.
        block_k: tokens in a key block.

    Returns:
        The reason with the value and what was expected, or ``None`` if it can serve.
    """
    if name not in BACKENDS:
        return f"backend must be one of {tuple(BACKENDS)}, got {name!r}"
    return BACKENDS[name].why_not(
        device=torch.device(device), dtype=dtype, head_dim=head_dim, block_q=block_q, block_k=block_k
    )


def self_test(
    name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int, block_q: int, block_k: int
) -> str | None:
    """Compare a backend with the masked reference on some hundred tokens, once per process and key.

    The mask is such that dense attention differs by more than ten times the tolerance, so a backend that ignores it
    fails. It is tried with and without a pooled remainder, with an order per head, with windows and with gathered keys.

    Args:
        name: the backend.
        device: where it shall run.
        dtype: of queries, keys and values.
        head_dim: columns of a head.
        block_q: tokens in a query block.
        block_k: tokens in a key block.

    Returns:
        What went wrong, or ``None``.
    """
    device = torch.device(device)
    if name == "reference":
        return None
    key = (name, _where(device), dtype, head_dim, block_q, block_k)
    if key not in _self_tests:
        try:
            _self_tests[key] = _compare(name, device, dtype, head_dim, block_q, block_k)
        except Exception as error:  # whatever a compiler or driver throws is a reason not to use it
            _self_tests[key] = f"self-test raised {type(error).__name__}: {error}"
    return _self_tests[key]


def choose_backend(
    *, device: torch.device | str, dtype: torch.dtype, head_dim: int, block_q: int, block_k: int
) -> tuple[str, dict[str, str]]:
    """Choose the first backend that can serve and passes its self-test.

    Args:
        device: where the tensors are.
        dtype: of queries, keys and values.
        head_dim: columns of a head.
        block_q: tokens in a query block.
        block_k: tokens in a key block.

    Returns:
        Its name, and for each backend that was passed over the reason. Warns once where only the reference is left.
    """
    device = torch.device(device)
    key = (_where(device), dtype, head_dim, block_q, block_k)
    if key in _choices:
        return _choices[key]
    reasons: dict[str, str] = {}
    chosen = "reference"
    for name, backend in BACKENDS.items():
        reason = why_not(name, device=device, dtype=dtype, head_dim=head_dim, block_q=block_q, block_k=block_k)
        if reason is None and device.type not in backend.devices and name != "reference":
            reason = f"chosen automatically only on {', '.join(backend.devices) or 'request'}, got {device}"
        if reason is None:
            reason = self_test(name, device, dtype, head_dim, block_q, block_k)
        if reason is None:
            chosen = name
            break
        reasons[name] = reason
    if chosen == "reference":
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        warnings.warn(f"block-sparse attention uses the slow reference ({why})", stacklevel=3)
    _choices[key] = chosen, reasons
    return chosen, reasons


def require_backend(
    name: str, *, device: torch.device, dtype: torch.dtype, head_dim: int, block_q: int, block_k: int
) -> None:
    """Raise unless a backend that was asked for by name can serve and passes its self-test.

    Raises:
        ValueError: unknown, or it cannot serve.
        RuntimeError: its self-test failed.
    """
    reason = why_not(name, device=device, dtype=dtype, head_dim=head_dim, block_q=block_q, block_k=block_k)
    if reason is not None:
        raise ValueError(f"backend={name!r} cannot be used: {reason}")
    reason = self_test(name, device, dtype, head_dim, block_q, block_k)
    if reason is not None:
        raise RuntimeError(f"backend={name!r} failed its self-test: {reason}")


def run_backend(name: str, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Run a backend without any check; arguments as in :class:`Backend`."""
    return BACKENDS[name].run(*args, **kwargs)


def _where(device: torch.device) -> tuple[Any, ...]:
    """Name a device such that equal models share their results."""
    if device.type == "cuda":
        return device.type, torch.cuda.get_device_name(device)
    return (device.type,)


def _compare(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, block_q: int, block_k: int
) -> str | None:
    from .self_tests import compare

    interpreted = name == "triton" and device.type == "cpu"
    tokens = (2 if interpreted else 6) * max(block_q, block_k) + 24
    run = BACKENDS[name].run
    return compare(run, _run_reference, device, dtype, head_dim, block_q, block_k, tokens=tokens)
