"""Loading a diffusers pipeline, saying which one it is, and fitting the arguments of its call."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel_eval.runs.errors import EvalError

__all__ = ["call_arguments", "describe", "load_pipeline", "resolve_device"]

_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAMPLED = 64
# Sane for a CPU: a clip in seconds. On a GPU the pipeline's own defaults hold.
_CPU_DEFAULTS = {"num_frames": 17, "num_inference_steps": 8, "height": 128, "width": 128}


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called ``auto``, ``cpu``, ``cuda`` (of this process) or ``cuda:N``.

    Raises:
        EvalError: unknown, or torch does not see one.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise EvalError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise EvalError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EvalError(f"device {name} was asked for, but torch sees no GPU; use --device cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
    return device


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and advice of other libraries out of the way, and put them back."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    try:
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch_dtype.*")
            yield
    finally:
        diffusers_logging.enable_progress_bar()
        transformers_logging.enable_progress_bar()


def load_pipeline(name: str | Path, device: torch.device, dtype: str = "auto") -> Any:
    """Load a pipeline from a folder, or by its name on the Hub.

    Args:
        name: folder with a ``model_index.json``, or a name such as ``Wan-AI/Wan2.1-T2V-1.3B-Diffusers``.
        device: where to put it.
        dtype: ``auto`` is bfloat16 on a GPU and float32 on a CPU; the VAE is always float32.

    Raises:
        EvalError: diffusers is missing, or there is no pipeline of that name.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise EvalError(f"diffusers is needed: pip install 'dit-accel[diffusers,eval]' ({error})") from None
    if dtype != "auto" and dtype not in _TYPES:
        raise EvalError(f"dtype must be auto, {', '.join(_TYPES)}, got {dtype!r}")
    folder = Path(name)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise EvalError(f"{folder} is no diffusers pipeline: it has no model_index.json")
    main = _TYPES[dtype] if dtype != "auto" else (torch.bfloat16 if device.type == "cuda" else torch.float32)
    types = {"default": main, "vae": torch.float32}  # VAEs of video models are not made for bfloat16
    try:
        with _quiet():
            pipe = DiffusionPipeline.from_pretrained(name, torch_dtype=types, local_files_only=folder.is_dir())
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip() or type(error).__name__
        raise EvalError(f"{name} could not be loaded: {reason.splitlines()[0]}") from None
    if device.type == "cuda":  # kernels and timers use the current device
        torch.cuda.set_device(device)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def describe(pipe: Any, name: str | Path | None = None) -> dict[str, Any]:
    """Say which pipeline this is, and on what it runs.

    Returns:
        ``id`` (name or folder), ``class``, ``digest`` of the weights, ``dtype`` of the transformer and ``device``.
    """
    device = torch.device(pipe._execution_device)
    shown = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    first = next(pipe.transformer.parameters(), None)
    return {
        "id": str(name) if name is not None else str(getattr(pipe, "name_or_path", "") or type(pipe).__name__),
        "class": type(pipe).__name__,
        "digest": _digest(pipe),
        "dtype": "none" if first is None else str(first.dtype).removeprefix("torch."),
        "device": shown,
    }


def _digest(pipe: Any) -> str:
    """Short digest of names, shapes and evenly spread values of all weights: quick, yet other weights show."""
    found = hashlib.sha256()
    components: Mapping[str, Any] = getattr(pipe, "components", None) or {"transformer": pipe.transformer}
    for part, module in sorted(components.items()):
        if not isinstance(module, nn.Module):
            continue
        for name, tensor in sorted(module.state_dict().items()):
            found.update(f"{part}.{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(_values(tensor))
    return found.hexdigest()[:12]


def _values(tensor: Tensor) -> bytes:
    if tensor.is_meta or not tensor.numel():
        return b""
    flat = tensor.detach().reshape(-1)
    some = flat[:: max(flat.numel() // _SAMPLED, 1)][:_SAMPLED]
    values = some.to("cpu", torch.float64) if some.is_floating_point() else some.to("cpu", torch.int64)
    data: bytes = values.numpy().tobytes()
    return data


def call_arguments(
    pipe: Any,
    *,
    steps: int | None = None,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    guidance: float | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Arguments of the pipeline call; ``None`` is the pipeline's default, on a CPU 17 frames of 128 x 128 and 8 steps.

    Raises:
        EvalError: a number below 1, frames that the VAE cannot make, or an argument that the pipeline does not know.
    """
    known = inspect.signature(pipe.__call__).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    height, width = size if size is not None else (None, None)
    asked: dict[str, Any] = {"num_inference_steps": steps, "num_frames": frames, "guidance_scale": guidance}
    asked |= {"height": height, "width": width}
    on_cpu = torch.device(pipe._execution_device).type == "cpu"
    for name, value in _CPU_DEFAULTS.items():
        if asked[name] is None and name in known:
            default = known[name].default
            asked[name] = value if on_cpu else default if isinstance(default, int) else None
    call = {name: value for name, value in {**asked, **dict(more or {})}.items() if value is not None}
    for name, value in call.items():
        if name not in known and not open_ended:
            raise EvalError(f"{type(pipe).__name__} knows no argument {name!r}")
        if name in ("num_inference_steps", "num_frames", "height", "width") and value < 1:
            raise EvalError(f"{name} must be at least 1, got {value}")
    _check_frames(pipe, call.get("num_frames"))
    return call


def _check_frames(pipe: Any, frames: int | None) -> None:
    period = getattr(pipe, "vae_scale_factor_temporal", None)
    if frames is None or not isinstance(period, int) or (frames - 1) % period == 0:
        return
    below = (frames - 1) // period * period + 1
    raise EvalError(
        f"frames must be 1 + a multiple of {period} for this model, got {frames}; {below} and {below + period} fit"
    )
