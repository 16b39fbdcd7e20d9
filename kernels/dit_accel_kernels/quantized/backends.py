"""Who computes attention on quantised operands; the rules are those of :mod:`dit_accel_kernels.backends`.

A backend that could run is used only after a self-test per number format, device, head size and block sizes.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from ..backends import Backend
from ..backends import why_not as sixteen_bit_reason
from ..quantize import Precision, fp8_reason

__all__ = ["BACKENDS", "choose", "require", "run", "self_test", "why_not"]


def _why_not_reference(**_: Any) -> str | None:
    return None


def _why_not_triton(*, precision: Precision, **where: Any) -> str | None:
    reason = sixteen_bit_reason("triton", **where)
    if reason is not None:
        return reason
    block_k, dtype = where["block_k"], where["dtype"]
    if block_k < 32:
        return f"block_k must be at least 32 with 8-bit operands, got {block_k}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype must be bfloat16 or float16, got {dtype}"
    if "fp8" in (precision.qk, precision.pv):
        return fp8_reason(where["device"])
    return None


def _why_not_hopper(**where: Any) -> str | None:
    if importlib.util.find_spec(f"{__package__}.hopper8_launch") is None:
        return "this build has no 8-bit Hopper kernel"
    from .hopper8_launch import why_not_hopper8

    return why_not_hopper8(**where)


def _run_reference(*args: Any, return_lse: bool, **kwargs: Any) -> tuple[Tensor, Tensor]:
    from .reference import quantized_reference

    return quantized_reference(*args, **kwargs)


def _run_triton(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    from .launch import quantized_triton

    return quantized_triton(*args, **kwargs)


def _run_hopper(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    from .hopper8_launch import run_hopper8

    return run_hopper8(*args, **kwargs)


# In order of preference. ``run`` is called with ``q, made, lists`` and the keywords ``scale``, ``order``, ``pooled``,
# ``key_valid`` and ``return_lse``; ``why_not`` also with ``precision``.
BACKENDS: dict[str, Backend] = {
    "hopper": Backend("hopper", _why_not_hopper, _run_hopper, ("cuda",)),
    "triton": Backend("triton", _why_not_triton, _run_triton, ("cuda",)),
    "reference": Backend("reference", _why_not_reference, _run_reference, ("cuda", "cpu")),
}
_self_tests: dict[tuple[Any, ...], str | None] = {}
_choices: dict[tuple[Any, ...], tuple[str, dict[str, str]]] = {}


def why_not(
    name: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    block_q: int,
    block_k: int,
    precision: Precision,
) -> str | None:
    """Say why a backend cannot serve; runs no kernel.

    Args:
        name: the backend.
        device: where the tensors are.
        dtype: of queries, keys and values as they are given.
        head_dim: columns of a head.
        block_q: tokens in a query block.
        block_k: tokens in a key block.
        precision: the number formats.

    Returns:
        The reason with the value and what was expected, or ``None`` if it can serve.
    """
    if name not in BACKENDS:
        return f"backend must be one of {tuple(BACKENDS)}, got {name!r}"
    where = {"dtype": dtype, "head_dim": head_dim, "block_q": block_q, "block_k": block_k}
    return BACKENDS[name].why_not(device=torch.device(device), precision=precision, **where)


def self_test(
    name: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    block_q: int,
    block_k: int,
    precision: Precision,
) -> str | None:
    """Compare a backend with the reference on some hundred tokens, once per process and key.

    Args:
        name: the backend.
        device: where it shall run.
        dtype: of queries, keys and values as they are given.
        head_dim: columns of a head.
        block_q: tokens in a query block.
        block_k: tokens in a key block.
        precision: the number formats.

    Returns:
        What went wrong, or ``None``.
    """
    device, precision = torch.device(device), _kernel(precision)
    if name == "reference":
        return None
    key = (name, _where(device), dtype, head_dim, block_q, block_k, precision)
    if key not in _self_tests:
        from .self_tests import compare

        tokens = (2 if device.type == "cpu" else 6) * max(block_q, block_k) + 24
        try:
            _self_tests[key] = compare(
                BACKENDS[name].run, device, dtype, head_dim, block_q, block_k, precision, tokens=tokens
            )
        except Exception as error:  # whatever a compiler or driver throws is a reason not to use it
            _self_tests[key] = f"self-test raised {type(error).__name__}: {error}"
    return _self_tests[key]


def choose(*, device: torch.device | str, precision: Precision, **where: Any) -> tuple[str, dict[str, str]]:
    """Choose the first backend that can serve and passes its self-test; arguments as of :func:`self_test`.

    Returns:
        Its name, and for each backend that was passed over the reason. Warns once where only the reference is left.
    """
    device, precision = torch.device(device), _kernel(precision)
    key = (_where(device), precision, *sorted((name, str(value)) for name, value in where.items()))
    if key in _choices:
        return _choices[key]
    reasons: dict[str, str] = {}
    chosen = "reference"
    for name, backend in BACKENDS.items():
        if name == "reference":
            break
        reason = why_not(name, device=device, precision=precision, **where)
        if reason is None and device.type not in backend.devices:
            reason = f"chosen automatically only on {', '.join(backend.devices)}, got {device}"
        if reason is None:
            reason = self_test(name, device=device, precision=precision, **where)
        if reason is None:
            chosen = name
            break
        reasons[name] = reason
    if chosen == "reference":
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        warnings.warn(f"quantised attention uses the slow reference ({why})", stacklevel=3)
    _choices[key] = chosen, reasons
    return chosen, reasons


def require(name: str, **where: Any) -> None:
    """Raise unless a backend that was asked for by name can serve and passes its self-test.

    Raises:
        ValueError: unknown, or it cannot serve.
        RuntimeError: its self-test failed.
    """
    reason = why_not(name, **where)
    if reason is not None:
        raise ValueError(f"backend={name!r} cannot be used: {reason}")
    reason = self_test(name, **where)
    if reason is not None:
        raise RuntimeError(f"backend={name!r} failed its self-test: {reason}")


def run(name: str, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Run a backend without any check."""
    return BACKENDS[name].run(*args, **kwargs)


def _kernel(precision: Precision) -> Precision:
    """The precision whose kernel computes this one: kernels see neither INT4 nor rotations, a mean is only added."""
    return Precision("int8" if precision.qk == "int4" else precision.qk, precision.pv)


def _where(device: torch.device) -> tuple[Any, ...]:
    """Name a device such that equal models share their results."""
    if device.type == "cuda":
        return device.type, torch.cuda.get_device_name(device)
    return (device.type,)
