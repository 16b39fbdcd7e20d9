"""The dense baseline: the fastest attention backend that diffusers can use here, compiled if asked for, and named."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["Baseline", "choose_backend", "compiled", "transformers_of", "using"]

# Names of diffusers' AttentionBackendName. The first is torch's own choice.
_CANDIDATES = ("native", "_native_cudnn", "_native_flash", "flash", "_flash_3")
_RUNS = 3


@dataclass(frozen=True)
class Baseline:
    """Which dense attention is compared with.

    Attributes:
        name: diffusers' name of the backend, ``None`` where the transformer takes none.
        seconds: a few denoising steps with each backend that works here.
        refused: why others do not.
    """

    name: str | None
    seconds: Mapping[str, float]
    refused: Mapping[str, str]

    def describe(self, compiled: bool, device: torch.device) -> str:
        """The baseline in words."""
        what = {"native": "torch SDPA, its own choice", "_native_cudnn": "cuDNN", "_native_flash": "torch SDPA, flash"}
        backend = "the transformer's own" if self.name is None else what.get(self.name, self.name)
        return f"dense attention by {backend}, {'compiled' if compiled else 'eager'}, on {device.type}"


def transformers_of(pipe: Any) -> list[Any]:
    """The transformers of a pipeline."""
    found = (getattr(pipe, name, None) for name in ("transformer", "transformer_2", "transformer_3"))
    return [module for module in found if isinstance(module, nn.Module)]


def choose_backend(pipe: Any, run: Callable[[], float], asked: str | None = None) -> Baseline:
    """Find the fastest backend by running each.

    Args:
        pipe: the pipeline.
        run: runs a few dense steps and returns their seconds.
        asked: take this backend and try no other.

    Raises:
        ValueError: ``asked`` cannot run here.
    """
    if not all(hasattr(module, "set_attention_backend") for module in transformers_of(pipe)):
        return Baseline(None, {}, {})
    device = torch.device(pipe._execution_device)
    names: Sequence[str] = [asked] if asked else _CANDIDATES if device.type == "cuda" else _CANDIDATES[:1]
    seconds: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name in names:
        try:
            with using(pipe, name):
                run()  # first calls compile and allocate
                seconds[name] = statistics.median(run() for _ in range(_RUNS if len(names) > 1 else 1))
        except Exception as error:  # each backend refuses in its own way, and all that counts is that it does
            refused[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
    if not seconds:
        raise ValueError(f"no dense attention backend works here: {refused}")
    return Baseline(min(seconds, key=lambda name: seconds[name]), seconds, refused)


def _processors(pipe: Any) -> list[Any]:
    """Objects that hold the name of their attention backend."""
    found = (getattr(m, "processor", None) for t in transformers_of(pipe) for m in t.modules())
    return [processor for processor in found if hasattr(processor, "_attention_backend")]


@contextmanager
def using(pipe: Any, name: str | None) -> Iterator[None]:
    """Dense attention by one backend within the block; what was set before is put back."""
    if name is None:
        yield
        return
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry
    from diffusers.utils import logging

    before = [(processor, processor._attention_backend) for processor in _processors(pipe)]
    # diffusers also makes the backend the default of the process, and says each time that this is experimental.
    default, verbosity = _AttentionBackendRegistry._active_backend, logging.get_verbosity()
    try:
        logging.set_verbosity_error()
        for module in transformers_of(pipe):
            module.set_attention_backend(name)
        logging.set_verbosity(verbosity)
        yield
    finally:
        logging.set_verbosity(verbosity)
        for processor, value in before:
            processor._attention_backend = value
        _AttentionBackendRegistry._active_backend = default


@contextmanager
def compiled(pipe: Any, wanted: bool) -> Iterator[None]:
    """Blocks of the transformers compiled within the block, each kind of block once.

    Raises:
        ValueError: a transformer cannot be compiled by blocks.
    """
    modules = transformers_of(pipe) if wanted else []
    for module in modules:
        if not hasattr(module, "compile_repeated_blocks"):
            raise ValueError(f"{type(module).__name__} has no repeated blocks to compile; use --no-compile")
    try:
        for module in modules:
            module.compile_repeated_blocks(fullgraph=True)
        yield
    finally:
        for module in modules:
            for part in module.modules():
                part._compiled_call_impl = None
