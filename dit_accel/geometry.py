"""Where every token of a sequence sits.

Diffusion transformers flatten a video ``[F, H, W]`` (an image is ``F = 1``) frame by frame and row by row, and place text,
reference or conditioning tokens in front of it or behind it. Planning needs nothing else from the model.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Grid", "TokenGeometry"]

Grid = tuple[int, int, int]
_DERIVED = -1


@dataclass(frozen=True)
class TokenGeometry:
    """Layout of one token sequence: ``prefix`` extra tokens, the visual tokens in raster order, ``suffix`` extra tokens.

    Token ``prefix + (f * H + h) * W + w`` of the sequence shows frame ``f``, row ``h``, column ``w``.

    Attributes:
        grid: latent frames, rows and columns ``(F, H, W)``, counted in tokens; ``None`` where no grid is known, then only
            methods that need one axis apply.
        prefix: extra tokens (text, reference, conditioning) in front of the visual tokens.
        suffix: extra tokens behind them.
        visual: number of visual tokens, ``F * H * W``; give it only without a grid (see :meth:`flat`).

    Raises:
        ValueError: a size is not positive, a count is negative, or ``visual`` contradicts ``grid``.
        TypeError: a size or count is not an integer.
    """

    grid: Grid | None
    prefix: int = 0
    suffix: int = 0
    visual: int = _DERIVED

    def __post_init__(self) -> None:
        for name in ("prefix", "suffix", "visual"):
            _require_int(name, getattr(self, name))
        for name in ("prefix", "suffix"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be a token count of at least 0, got {getattr(self, name)}")
        if self.grid is None:
            if self.visual < 1:
                raise ValueError(f"visual must be at least 1 when grid is None, got {self.visual}")
            return
        object.__setattr__(self, "grid", _checked_grid(self.grid))
        frames, height, width = self.grid
        if self.visual not in (_DERIVED, frames * height * width):
            raise ValueError(
                f"visual must be {frames}*{height}*{width} = {frames * height * width} for this grid, got {self.visual}"
            )
        object.__setattr__(self, "visual", frames * height * width)

    @classmethod
    def flat(cls, tokens: int, prefix: int = 0, suffix: int = 0) -> TokenGeometry:
        """Geometry of ``tokens`` visual tokens on one axis, for models whose grid is not known."""
        return cls(None, prefix, suffix, tokens)

    @property
    def tokens(self) -> int:
        """Length of the whole sequence."""
        return self.prefix + self.visual + self.suffix

    @property
    def extra(self) -> int:
        """Number of tokens that are not visual."""
        return self.prefix + self.suffix

    @property
    def visual_slice(self) -> slice:
        """Positions of the visual tokens in natural order."""
        return slice(self.prefix, self.prefix + self.visual)

    @property
    def is_video(self) -> bool:
        """Whether there is a grid with more than one frame."""
        return self.grid is not None and self.grid[0] > 1

    @property
    def axes(self) -> Grid:
        """The grid, or ``(1, 1, visual)`` where there is none."""
        return self.grid if self.grid is not None else (1, 1, self.visual)

    def check(self, seq_len: int) -> str | None:
        """Reason why a sequence of ``seq_len`` tokens does not have this geometry, or ``None`` when it fits."""
        if seq_len == self.tokens:
            return None
        return f"the sequence must have {self.tokens} tokens for geometry {self}, got {seq_len}"

    def __str__(self) -> str:
        body = "x".join(map(str, self.grid)) if self.grid is not None else f"{self.visual} flat"
        if self.prefix and self.suffix:
            return f"{body} (+{self.prefix} text, +{self.suffix} behind)"
        if self.prefix:
            return f"{body} (+{self.prefix} text)"
        return f"{body} (+{self.suffix} text behind)" if self.suffix else body


def _require_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")


def _checked_grid(grid: object) -> Grid:
    if not isinstance(grid, (tuple, list)) or len(grid) != 3:
        raise ValueError(f"grid must be (frames, height, width) or None, got {grid!r}")
    for name, size in zip(("frames", "height", "width"), grid):
        _require_int(name, size)
        if size < 1:
            raise ValueError(f"{name} of grid must be at least 1, got {size} in {tuple(grid)}")
    return (grid[0], grid[1], grid[2])
