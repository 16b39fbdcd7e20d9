"""What the user chose in the node, checked."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from dit_accel.method import Method
from dit_accel.presets import get_method

__all__ = ["BLOCK_SIZES", "PRECISIONS", "QUALITIES", "Settings", "parse_blocks"]

#: Share of the blocks that a sparse step computes exactly, by quality; ``None``: the method's own, or the number given.
QUALITIES: dict[str, float | None] = {"balanced": 0.2, "fast": 0.1, "high": 0.35, "method": None, "custom": None}
#: Precisions of :class:`dit_accel.Method` that the node offers.
_NARROW = ("auto", "int8_fp8", "int8")
#: Type of q, k and v in sparse attention; ``None`` leaves them as the model made them, for the kernel to quantise or not.
PRECISIONS: dict[str, torch.dtype | None] = {
    "model": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    **dict.fromkeys(_NARROW),
}
BLOCK_SIZES = ("auto", "64", "128")

_RANGE = re.compile(r"^(\d+)(?:\s*-\s*(\d+))?$")


def parse_blocks(text: str) -> tuple[int, ...]:
    """Numbers of a list such as ``"0, 1, 47-49"``, in order and without repeats.

    Raises:
        ValueError: if a part is neither a number nor a range that goes upwards.
    """
    found: set[int] = set()
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        match = _RANGE.match(part)
        if match is None:
            raise ValueError(f"dense_blocks must be a list such as '0, 1, 47-49', got {part!r} in {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"dense_blocks: the range {part!r} runs backwards; write '{last}-{first}'")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def _with_mean(method: Method, density: float) -> Method:
    """The method with a density; where it has one that falls over the run, it falls as steeply around ``density``."""
    if not isinstance(method.density, tuple):
        return method.replace(density=density)
    first = min(2 * density * method.density[0] / sum(method.density), 1.0)
    made = method.replace(density=(first, 2 * density - first) if density <= 1 else density)
    if "density" not in dict(method.pictures):
        return made
    return made.replace(pictures={**dict(made.pictures), "density": density})  # theirs does not fall


@dataclass(frozen=True)
class Settings:
    """One accelerated model's settings. Immutable, and JSON by :meth:`to_dict`.

    Attributes:
        method: name of a method of dit_accel.
        quality: a key of :data:`QUALITIES`.
        density: share of the blocks computed exactly on a sparse step, on average where the method's falls over the
            run; counts for quality ``"custom"`` only.
        precision: a key of :data:`PRECISIONS`.
        start_percent: attention is dense before this share of the noise schedule, as ComfyUI counts it.
        end_percent: and behind this one.
        dense_blocks: numbers of blocks that stay dense.
        min_tokens: shorter sequences stay dense.
        block_size: tokens per block of the sparse kernel, of :data:`BLOCK_SIZES`.

    Raises:
        ValueError: if a value is out of range; the message names it and what was expected.
    """

    method: str = "auto"
    quality: str = "balanced"
    density: float = 0.2
    precision: str = "model"
    start_percent: float = 0.2
    end_percent: float = 1.0
    dense_blocks: tuple[int, ...] = field(default=())
    min_tokens: int = 4096
    block_size: str = "auto"

    def __post_init__(self) -> None:
        """Check every field."""
        object.__setattr__(self, "dense_blocks", tuple(self.dense_blocks))
        for name, known in (("quality", QUALITIES), ("precision", PRECISIONS), ("block_size", BLOCK_SIZES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("start_percent", "end_percent"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)!r}")
        if self.start_percent >= self.end_percent:
            raise ValueError(
                f"start_percent must be below end_percent, got {self.start_percent:g} and {self.end_percent:g}; "
                "with 0.2 and 1.0 the first fifth of the schedule stays dense"
            )
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens must be at least 0, got {self.min_tokens}")
        self.build()

    def build(self) -> Method:
        """The method with the chosen density; the schedule comes with the sampler's sigmas.

        Raises:
            ValueError: if the method is unknown, or has no share of blocks for the chosen quality.
        """
        method = get_method(self.method)
        if self.precision in _NARROW and not method.is_dense:
            method = method.replace(precision=self.precision)
        if method.is_dense or self.quality == "method":
            return method
        chosen = QUALITIES[self.quality]
        if chosen is not None and not method.keeps_density:
            raise ValueError(
                f"method {self.method!r} does not keep a fixed share of the blocks, so quality {self.quality!r} means "
                "nothing to it; choose quality 'method' (its own default) or 'custom'"
            )
        return _with_mean(method, self.density if chosen is None else chosen)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` is the inverse."""
        return {**asdict(self), "dense_blocks": list(self.dense_blocks)}

    @classmethod
    def from_dict(cls, data: Any) -> Settings:
        """Rebuild from :meth:`to_dict`.

        Raises:
            ValueError: if a key is unknown, a type is wrong or a value is out of range.
        """
        known = [f.name for f in fields(cls)]
        if not isinstance(data, dict) or (unknown := sorted(set(data) - set(known))):
            given = unknown if isinstance(data, dict) else data
            raise ValueError(f"settings must be an object with the keys {', '.join(known)}, got {given!r}")
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"settings have a value of the wrong type: {error}") from None
