"""A method: one frozen choice for each slot of the engine."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from dit_accel._specs import parse_spec
from dit_accel.order import AXIS_ORDERS, ORDERS
from dit_accel.windows import WindowSpec

__all__ = ["METHOD_VERSION", "Method"]

METHOD_VERSION = 1

_ORDER_CHOICES = ("fixed", "recall", "paro")
_SCORES = ("mass", "mean_pool", "window", "none")
_SELECTIONS = ("top_k", "top_k_adaptive", "top_k_head", "top_p", "threshold", "all")
_COMPENSATIONS = ("drop", "mean")
_BRANCHES = ("separate", "shared")
_BLOCKS = (64, 128)

Axes = int | tuple[int, ...] | None


def _require(ok: bool, field: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"{field} must be {expected}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Method:
    """A named choice for each slot. Immutable; make variants with :meth:`replace`.

    Attributes:
        name: short name, as given to :func:`dit_accel.enable`.
        summary: one line.
        paper: arXiv id of the paper, or ``None``.
        order: candidate token orders (see :mod:`dit_accel.order`). ``"axes"`` stands for the six
            axis permutations of PAROAttention.
        order_choice: how each head picks among them: ``"fixed"`` (there is one), ``"recall"`` (the
            softmax mass that the resulting mask keeps) or ``"paro"`` (PAROAttention's metric, static
            methods only).
        score: estimate of block importance: ``"mass"`` (exact softmax mass from the LSE),
            ``"mean_pool"``, ``"window"`` (geometry) or ``"none"``.
        select: ``"top_k"`` per row, ``"top_k_adaptive"`` (AdaSpa's head-adaptive budgets),
            ``"top_k_head"`` (one budget over a head), ``"top_p"``, ``"threshold"`` or ``"all"``.
        density: share of blocks computed exactly on a sparse step, or ``(first, last)`` for a
            density that falls linearly over the sparse steps and follows at each refresh. For
            ``"top_p"`` the share of mass to keep, for ``"threshold"`` the least mean mass of a block.
        compensate: ``"drop"``, or ``"mean"``: each skipped block enters the softmax as one key.
        block_q: tokens in a query block, 64 or 128.
        block_k: tokens in a key block, 64 or 128.
        warmup: share of the denoising steps that stay dense at the start.
        end: share of the steps after which attention is dense again.
        refresh: shares of the run at which the plan is made again.
        dense_layers: indices of layers that stay dense; negative ones count from the end.
        branches: whether guidance branches have their own plans or share the first one's.
        static: the plan comes from :func:`dit_accel.calibrate` and outlives runs.
        static_share: for static methods, share of steps that have a mask of their own; the rest
            share one.
        window: tokens of the neighbourhood per axis (frames, height, width), one number or ``None``
            (from ``density``); ``-1`` is the whole axis.
        stride: stride of the neighbourhood per axis (NATTEN's GNA).
        dilation: dilation of the neighbourhood per axis.
        causal: causal axes of the neighbourhood.
        version: schema version.
    """

    name: str
    summary: str = ""
    paper: str | None = None
    order: tuple[str, ...] = ("raster",)
    order_choice: str = "fixed"
    score: str = "mass"
    select: str = "top_k"
    density: float | tuple[float, float] = 0.25
    compensate: str = "drop"
    block_q: int = 64
    block_k: int = 64
    warmup: float = 0.2
    end: float = 1.0
    refresh: tuple[float, ...] = ()
    dense_layers: tuple[int, ...] = ()
    branches: str = "separate"
    static: bool = False
    static_share: float = 0.5
    window: Axes = None
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False
    version: int = METHOD_VERSION

    def __post_init__(self) -> None:
        """Normalise sequences to tuples and check every field."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
            elif field.name in ("refresh", "dense_layers") and _is_number(value):
                object.__setattr__(self, field.name, (value,))
        names = (self.order,) if isinstance(self.order, str) else self.order
        expanded = [n for name in names for n in (AXIS_ORDERS if name == "axes" else (name,))]
        object.__setattr__(self, "order", tuple(dict.fromkeys(expanded)))
        self._check_density()
        _require(bool(self.name), "name", self.name, "a non-empty string")
        _require(len(self.order) > 0, "order", self.order, "at least one order name")
        for slot, known in (
            ("order_choice", _ORDER_CHOICES),
            ("score", _SCORES),
            ("select", _SELECTIONS),
            ("compensate", _COMPENSATIONS),
            ("branches", _BRANCHES),
            ("block_q", _BLOCKS),
            ("block_k", _BLOCKS),
        ):
            value = getattr(self, slot)
            _require(value in known and type(value) in (str, int), slot, value, "one of " + ", ".join(map(repr, known)))
        for share_name in ("warmup", "end", "static_share"):
            value = getattr(self, share_name)
            _require(_is_number(value) and 0 <= value <= 1, share_name, value, "between 0 and 1")
        _require(
            all(_is_number(r) and 0 <= r <= 1 for r in self.refresh),
            "refresh",
            self.refresh,
            "shares of the run between 0 and 1",
        )
        ok = all(isinstance(i, int) and not isinstance(i, bool) for i in self.dense_layers)
        _require(ok, "dense_layers", self.dense_layers, "layer numbers")
        for name in self.order:
            ORDERS.entry(parse_spec(name).name)
        WindowSpec(-1 if self.window is None else self.window, 1, self.dilation, self.causal)
        self._check_combination()

    def _check_density(self) -> None:
        values = self.density if isinstance(self.density, tuple) else (self.density,)
        ok = len(values) in (1, 2) and all(_is_number(v) and math.isfinite(v) and 0 < v <= 1 for v in values)
        _require(ok, "density", self.density, "above 0 and at most 1, or a pair of such numbers")

    def _check_combination(self) -> None:
        if self.score in ("window", "none") and self.order_choice != "fixed":
            raise ValueError(
                f"order_choice {self.order_choice!r} needs scores to choose by, but score is "
                f"{self.score!r}; use order_choice='fixed'"
            )
        if len(self.order) > 1 and self.order_choice == "fixed":
            raise ValueError(
                f"several orders need order_choice='recall', which lets each head choose; got {self.order} with 'fixed'"
            )
        if self.order_choice == "paro" and not self.static:
            raise ValueError("order_choice='paro' is for static methods; use order_choice='recall'")
        if self.score == "window" and isinstance(self.density, tuple):
            raise ValueError(f"score='window' takes one density, a window does not change; got {self.density}")
        if self.score == "none" and self.select != "all":
            raise ValueError(f"score 'none' goes with select 'all' only, got {self.select!r}")
        if self.score == "window" and self.compensate != "drop":
            raise ValueError(
                "compensate='mean' cannot go with score='window': its masks are token-level and a "
                "block mean would count visible keys twice; use compensate='drop'"
            )
        if self.static and self.score != "mass":
            raise ValueError(f"a static plan is made from score 'mass', got {self.score!r}")

    @property
    def is_dense(self) -> bool:
        """Whether every block is kept, so that dense attention does the same."""
        return self.select == "all"

    def density_at(self, place: float) -> float:
        """Density of the plan that lies at ``place`` between the first plan of a run, 0, and the last, 1."""
        if not isinstance(self.density, tuple):
            return self.density
        first, last = self.density
        return first + (last - first) * min(max(place, 0.0), 1.0)

    def replace(self, **changes: Any) -> Method:
        """Copy with some fields changed.

        Raises:
            ValueError: for an unknown field (with the known ones) or a bad value.
        """
        known = {f.name for f in dataclasses.fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise ValueError(
                f"unknown option {', '.join(map(repr, unknown))}; known are " + ", ".join(sorted(known - {"version"}))
            )
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` is the inverse."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Method:
        """Rebuild from :meth:`to_dict`.

        Raises:
            ValueError: if a key is unknown, the version is newer than this one or a value is bad.
        """
        if not isinstance(data, dict) or "name" not in data:
            raise ValueError(f"a method is a JSON object with a 'name', got {data!r}")
        version = data.get("version", METHOD_VERSION)
        if not isinstance(version, int) or version > METHOD_VERSION:
            raise ValueError(
                f"method {data['name']!r} has version {version!r}, this dit_accel reads up to "
                f"{METHOD_VERSION}; a newer dit_accel is needed"
            )
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(f"method {data['name']!r} has unknown keys {unknown}; known are {sorted(known)}")
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**fields)

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Method:
        """Rebuild from :meth:`to_json`.

        Raises:
            ValueError: if the text is not JSON or does not describe a method.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a method file: {error}") from None
        return cls.from_dict(data)

    def describe(self) -> str:
        """The slots as text, one a line."""
        paper = f" (arXiv {self.paper})" if self.paper else ""
        lines = [f"{self.name}{paper}: {self.summary}"]
        order = ", ".join(self.order)
        lines.append(f"  order       {order}; choice {self.order_choice}")
        lines.append(f"  score       {self.score}")
        lines.append(f"  selection   {self.select}, density {self.density}")
        lines.append(f"  remainder   {self.compensate}")
        lines.append(f"  blocks      {self.block_q} x {self.block_k}")
        lines.append(f"  schedule    warm-up {self.warmup:g}, end {self.end:g}, refresh {list(self.refresh)}")
        if self.score == "window":
            lines.append(
                f"  window      {self.window}, stride {self.stride}, dilation {self.dilation}, causal {self.causal}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        """The slots as text."""
        return self.describe()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
