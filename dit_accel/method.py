"""A method: one frozen choice for each slot of the engine."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dit_accel._specs import Registry, parse_spec
from dit_accel.choice import CHOICES
from dit_accel.combination import check_combination, keeps_data
from dit_accel.compensate import COMPENSATIONS, make_compensation
from dit_accel.content import CONTENT_ORDERS
from dit_accel.geometry import TokenGeometry
from dit_accel.order import AXIS_ORDERS, ORDERS
from dit_accel.pattern import PATTERNS
from dit_accel.precision import PrecisionRule, parse_precision
from dit_accel.reuse import Reuse, parse_reuse
from dit_accel.score import SCORES
from dit_accel.selection import SELECTIONS
from dit_accel.windows import WindowSpec

__all__ = ["METHOD_VERSION", "Method"]

METHOD_VERSION = 1

_BRANCHES = ("separate", "shared")
_BLOCKS = (16, 32, 64, 128)
_OF_PICTURES = (
    *("order", "order_choice", "score", "select", "density", "compensate", "block_q", "block_k", "hopper_blocks"),
    *("branches", "warmup", "refresh", "dense_share"),
)
_DEFAULT_DENSITY = 0.25
_BY_SHARE = ("top_k", "top_k_adaptive", "top_k_head", "top_k_layer", "top_k_or_p", "top_p", "head_global", "cdf")

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
        order: candidate token orders, specs of :mod:`dit_accel.order`; ``"axes"`` stands for the six
            axis permutations of PAROAttention. Or one content order of :mod:`dit_accel.content`.
        order_choice: how each head picks among them, a spec of :mod:`dit_accel.choice`: ``"fixed"``
            (there is one), ``"recall"`` (the softmax mass that the resulting mask keeps) and others.
        score: estimate of block importance, a spec of :mod:`dit_accel.score` such as ``"mass"`` (exact
            softmax mass from the LSE) or ``"mean_pool"``, or of :mod:`dit_accel.pattern`, which follows
            from the geometry alone, such as ``"window"``.
        select: which blocks are computed, a spec of :mod:`dit_accel.selection` such as ``"top_k"`` or
            ``"top_p:0.9"``. Patterns have chosen already.
        density: share of the map computed on a sparse step, or ``(first, last)`` for a density that
            falls linearly over the sparse steps and follows at each refresh. ``None`` leaves it to the
            selection's own strength, ``0.9`` in ``"top_p:0.9"``, or to the pattern's parameters; a
            density overrides them. Selections without a strength get 0.25.
        compensate: what becomes of skipped blocks, a spec of :mod:`dit_accel.compensate`: ``"drop"``,
            ``"mean"`` (each enters the softmax as one key) and others.
        block_q: tokens in a query block, 16, 32, 64 or 128.
        block_k: tokens in a key block, 16, 32, 64 or 128.
        hopper_blocks: ``(block_q, block_k)`` to use instead where the Hopper kernel serves them, whose rate needs larger
            tiles than the portable kernel's; ``None`` for the same everywhere. :meth:`replace` with a block size drops it.
        pictures: fields that differ where the sequence is one picture, such as ``{"score": "fine_spread:8"}``, kept as
            pairs; of those that decide a plan. :meth:`replace` drops what it sets.
        warmup: share of the denoising steps that stay dense at the start.
        end: share of the steps after which attention is dense again.
        refresh: shares of the run at which the plan is made again.
        dense_share: share of a run's work that dense steps take, which then lie all over the run in place of ``refresh``; 0
            leaves it to ``refresh``. For plans that are made on dense steps; see :mod:`dit_accel.dense_steps`.
        reuse: how long plans live besides, specs of :mod:`dit_accel.reuse`: ``"every:4"``,
            ``"similar:0.9"``, ``"leaders:0x4x8"``.
        dense_every: every so many sparse steps one is dense; 0 for none.
        logit_scale: ``"none"``, or ``"sqrt_log:1560"``: logits of sparse steps are multiplied by
            ``sqrt(log(S) / log(1560))`` for a model trained on 1560 tokens (FreeSwim, arXiv 2511.14712); a second
            number, ``"sqrt_log:1560,3120"``, stands in place of ``S``.
        cross_attention: ``"live"``, or ``"cached"``: outputs of cross-attention on dense steps stand in for those of the
            sparse steps that follow, by layer and branch (FreeSwim); ``"cached:cond"`` does so for the named branch
            alone. Models without cross-attention modules are not touched.
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
        precision: number formats of exact blocks: ``"bf16"`` (the 16-bit type of the model), ``"int8"``, ``"int8_fp8"``,
            ``"fp8"``, ``"int8_int8"``, ``"int4"`` and others of :data:`dit_accel_kernels.quantize.PRECISIONS`, or
            ``"auto"``: each head by its measured error; see :func:`dit_accel.precision.parse_precision`.
        version: schema version.
    """

    name: str
    summary: str = ""
    paper: str | None = None
    order: tuple[str, ...] = ("raster",)
    order_choice: str = "fixed"
    score: str = "mass"
    select: str = "top_k"
    density: float | tuple[float, float] | None = None
    compensate: str = "drop"
    block_q: int = 64
    block_k: int = 64
    hopper_blocks: tuple[int, int] | None = None
    pictures: tuple[tuple[str, Any], ...] = ()
    warmup: float = 0.2
    end: float = 1.0
    refresh: tuple[float, ...] = ()
    dense_share: float = 0.0
    reuse: tuple[str, ...] = ()
    dense_every: int = 0
    logit_scale: str = "none"
    cross_attention: str = "live"
    dense_layers: tuple[int, ...] = ()
    branches: str = "separate"
    static: bool = False
    static_share: float = 0.5
    window: Axes = None
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False
    precision: str = "bf16"
    version: int = METHOD_VERSION

    def __post_init__(self) -> None:
        """Normalise sequences to tuples and check every field."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
            elif field.name in ("refresh", "dense_layers") and _is_number(value):
                object.__setattr__(self, field.name, (value,))
        if isinstance(self.reuse, str):
            object.__setattr__(self, "reuse", (self.reuse,))
        self._normalise_pictures()
        names = (self.order,) if isinstance(self.order, str) else self.order
        named = isinstance(names, tuple) and all(isinstance(name, str) for name in names)
        _require(named, "order", self.order, "the name of an order, or several")
        expanded = [n for name in names for n in (AXIS_ORDERS if name == "axes" else (name,))]
        object.__setattr__(self, "order", tuple(dict.fromkeys(expanded)))
        self._check_density()
        for slot in ("order_choice", "score", "select", "compensate"):
            expected = "a name, or a name with values such as 'top_p:0.9'"
            _require(isinstance(getattr(self, slot), str), slot, getattr(self, slot), expected)
        _require(bool(self.name), "name", self.name, "a non-empty string")
        _require(len(self.order) > 0, "order", self.order, "at least one order name")
        for slot, known in (
            ("branches", _BRANCHES),
            ("block_q", _BLOCKS),
            ("block_k", _BLOCKS),
        ):
            value = getattr(self, slot)
            _require(value in known and type(value) in (str, int), slot, value, "one of " + ", ".join(map(repr, known)))
        pair = self.hopper_blocks
        ok = pair is None or (isinstance(pair, tuple) and len(pair) == 2 and all(p in _BLOCKS for p in pair))
        _require(ok, "hopper_blocks", pair, f"None or two of {', '.join(map(str, _BLOCKS))}")
        for share_name in ("warmup", "end", "static_share", "dense_share"):
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
        every = self.dense_every
        _require(
            isinstance(every, int) and not isinstance(every, bool) and every >= 0, "dense_every", every, "at least 0"
        )
        self._check_slots()
        if self.density is None and not (self.is_geometric or self.has_strength) and self.keeps_density:
            object.__setattr__(self, "density", _DEFAULT_DENSITY)
        WindowSpec(-1 if self.window is None else self.window, 1, self.dilation, self.causal)
        self._check_combination()
        check_combination(self)

    def _check_slots(self) -> None:
        for name in self.order:
            spec = parse_spec(name)
            if spec.name in CONTENT_ORDERS:
                CONTENT_ORDERS.check(spec, 1)
            else:
                ORDERS.check(spec, 1)
        CHOICES.check(self.order_choice, 2)
        try:
            (PATTERNS if self.is_geometric else SCORES).check(self.score, 1)
        except ValueError as error:
            known = self.is_geometric or parse_spec(self.score).name in SCORES
            raise ValueError(f"{error}" if known else f"{error} (patterns are {', '.join(PATTERNS.names())})") from None
        SELECTIONS.check(self.select, 2)
        self._check_share()
        COMPENSATIONS.check(self.compensate, 0)
        make_compensation(self.compensate)
        parse_reuse(self.reuse)
        parse_precision(self.precision)
        self.logit_factor(2)
        cross = parse_spec(self.cross_attention)
        ok = (cross.name == "live" and not cross.args) or (cross.name == "cached" and len(cross.args) <= 1)
        _require(
            ok and not cross.kwargs, "cross_attention", self.cross_attention, "'live', 'cached' or 'cached:BRANCH'"
        )

    def _check_share(self) -> None:
        """Whether the strength of a selection by share, ``0.9`` in ``"top_p:0.9"``, is one."""
        spec = parse_spec(self.select)
        if spec.name in _BY_SHARE:
            ok = all(_is_number(v) and 0 <= v <= 1 for v in (*spec.args, *spec.kwargs.values()))  # type: ignore[operator]
            _require(ok, "select", self.select, f"'{spec.name}:SHARE' with a share between 0 and 1")

    def _normalise_pictures(self) -> None:
        """Keep what is different for pictures as sorted pairs, and check it."""
        given = self.pictures.items() if isinstance(self.pictures, dict) else self.pictures
        ok = all(isinstance(pair, list | tuple) and len(pair) == 2 and pair[0] in _OF_PICTURES for pair in given)
        _require(ok, "pictures", self.pictures, f"values of some of {', '.join(_OF_PICTURES)}")
        pairs = ((name, tuple(value) if isinstance(value, list) else value) for name, value in given)
        object.__setattr__(self, "pictures", tuple(sorted(pairs, key=lambda pair: pair[0])))
        assert self.for_pictures is not None  # made, and so checked, now

    @cached_property
    def for_pictures(self) -> Method:
        """The method as it is where the sequence is one picture."""
        return dataclasses.replace(self, pictures=(), **dict(self.pictures)) if self.pictures else self

    def fitting(self, geometry: TokenGeometry) -> Method:
        """The method for a sequence: :attr:`for_pictures`, or as it is."""
        return self.for_pictures if geometry.grid is not None and geometry.grid[0] == 1 else self

    def _check_density(self) -> None:
        if self.density is None:
            return
        pair = isinstance(self.density, tuple)
        values = self.density if isinstance(self.density, tuple) else (self.density,)
        ok = len(values) == 1 + pair and all(_is_number(v) and math.isfinite(v) and 0 < v <= 1 for v in values)
        _require(ok, "density", self.density, "above 0 and at most 1, or a pair of such numbers")

    def _check_combination(self) -> None:
        choice, score = parse_spec(self.order_choice).name, parse_spec(self.score).name
        if choice == "recall" and (self.is_geometric or score == "none"):
            raise ValueError(
                f"order_choice {self.order_choice!r} needs scores to choose by, but score is "
                f"{self.score!r}; use order_choice='fixed'"
            )
        if len(self.order) > 1 and choice == "fixed":
            raise ValueError(
                f"several orders need order_choice='recall', which lets each head choose; got {self.order} with 'fixed'"
            )
        if CHOICES.trait(choice, "patterns", False) and not self.is_geometric:
            raise ValueError(f"order_choice={choice!r} goes with a pattern, got score={score!r}; use 'recall'")
        if self.static and self.is_geometric and PATTERNS.trait(score, "candidates") is None:
            raise ValueError(f"pattern {score!r} has no candidates to choose among by calibration; use static=False")
        content = [name for name in self.order if parse_spec(name).name in CONTENT_ORDERS]
        if content and (len(self.order) > 1 or self.is_geometric or self.static):
            raise ValueError(
                f"order {content[0]!r} depends on the tokens: it stands alone, with scores of the data and without "
                f"calibration; got order={self.order}, score={self.score!r}, static={self.static}"
            )
        if CHOICES.trait(choice, "static", False) and not self.static:
            raise ValueError(f"order_choice={choice!r} is for static methods; use order_choice='recall'")
        if self.is_geometric and isinstance(self.density, tuple):
            raise ValueError(f"score={score!r} takes one density, a pattern does not change; got {self.density}")
        clusters = SCORES.trait(score, "clusters", False) if score in SCORES else False
        if clusters and parse_spec(self.order[0]).name not in ("kmeans", "routing"):
            raise ValueError(f"score {score!r} goes with order 'kmeans' or 'routing', got order={self.order}")
        gathers = SCORES.trait(score, "gathers", False) if score in SCORES else False
        if gathers and (self.has_levels or make_compensation(self.compensate).pooled):
            raise ValueError(
                f"score {score!r} gathers keys itself, which cannot go with select={self.select!r} and "
                f"compensate={self.compensate!r}; use select='insisted', compensate='drop'"
            )
        if score == "none" and parse_spec(self.select).name not in ("all", "insisted"):
            raise ValueError(f"score 'none' goes with select 'all' or 'insisted' only, got {self.select!r}")
        if self.is_geometric and make_compensation(self.compensate).pooled and PATTERNS.trait(score, "windows", False):
            raise ValueError(
                f"compensate={self.compensate!r} cannot go with score={score!r}: its masks are token-level and a "
                "block mean would count visible keys twice; use compensate='drop'"
            )
        if self.static and not self.is_geometric and score != "mass":
            raise ValueError(f"a static plan is made from score 'mass' or a pattern, got {self.score!r}")

    @cached_property
    def is_geometric(self) -> bool:
        """Whether the mask follows from the geometry alone."""
        return parse_spec(self.score).name in PATTERNS

    @cached_property
    def is_dense(self) -> bool:
        """Whether every block is kept in 16 bit, so that dense attention does the same."""
        return not self.is_geometric and parse_spec(self.select).name == "all" and self.precision_rule.wide

    @cached_property
    def plans_from_data(self) -> bool:
        """Whether a plan looks at queries and keys; a pattern in a fixed order does not, unless its compensation does."""
        if not self.is_geometric or keeps_data(self.compensate):
            return True
        return parse_spec(self.order_choice).name != "fixed"

    @cached_property
    def needs_lse(self) -> bool:
        """Whether plans are made from the log-sum-exp or the output of dense attention."""
        if make_compensation(self.compensate).needs_dense:
            return True
        scored = not self.is_geometric and bool(SCORES.trait(self.score, "needs_lse", False))
        return scored or bool(CHOICES.trait(self.order_choice, "needs_lse", False))

    @cached_property
    def keeps_density(self) -> bool:
        """Whether a density can be asked for, and is kept."""
        name = parse_spec(self.select).name
        chosen_by_score = name == "insisted" and not self.is_geometric
        return name not in ("all", "insisted") or (
            chosen_by_score and bool(SCORES.trait(self.score, "keeps_density", False))
        )

    @cached_property
    def has_strength(self) -> bool:
        """Whether the selection was given a strength of its own, or leaves the choice to the score rule."""
        spec = parse_spec(self.select)
        return bool(spec.args or spec.kwargs) or spec.name == "insisted"

    @cached_property
    def has_levels(self) -> bool:
        """Whether the selection gives levels of a pyramid besides exact and skipped blocks."""
        return bool(SELECTIONS.trait(self.select, "levels", False))

    @cached_property
    def reuse_rules(self) -> Reuse:
        """:attr:`reuse`, parsed."""
        return parse_reuse(self.reuse)

    @cached_property
    def precision_rule(self) -> PrecisionRule:
        """:attr:`precision`, parsed."""
        return parse_precision(self.precision)

    @cached_property
    def content_order(self) -> str | None:
        """The content order, if :attr:`order` names one."""
        return self.order[0] if parse_spec(self.order[0]).name in CONTENT_ORDERS else None

    def plan_costs(self, geometry: TokenGeometry, candidates: int) -> tuple[float, float]:
        """Work of a run's first plan and of each later one, in dense attentions.

        The order is chosen once, but for patterns, of which nothing else could change.

        What only the data decide is not in it.
        """
        again = 0.0 if self.is_geometric else _cost_of(SCORES, self.score, self, geometry)
        if self.content_order is not None:
            again += _cost_of(CONTENT_ORDERS, self.content_order, self, geometry)
        chosen = _cost_of(CHOICES, self.order_choice, self, geometry, candidates) if candidates > 1 else 0.0
        return again + chosen, again + (chosen if self.is_geometric else 0.0)

    def logit_factor(self, tokens: int) -> float:
        """What :attr:`logit_scale` multiplies the logits of a sequence of ``tokens`` by."""
        if self.logit_scale == "none":  # asked on every call
            return 1.0
        spec = parse_spec(self.logit_scale)
        if spec.name == "none" and not spec.args and not spec.kwargs:
            return 1.0
        native, *seen = spec.args or (None,)
        ok = spec.name == "sqrt_log" and len(seen) <= 1 and not spec.kwargs
        ok = ok and all(isinstance(n, int) and not isinstance(n, bool) and n > 1 for n in (native, *seen))
        expected = "'none', 'sqrt_log:N' with the tokens N of the training size, or 'sqrt_log:N,M' with M tokens in all"
        _require(ok, "logit_scale", self.logit_scale, expected)
        assert isinstance(native, int)
        known = seen[0] if seen and isinstance(seen[0], int) else tokens
        return math.sqrt(math.log(max(known, 2)) / math.log(native))

    def density_at(self, place: float) -> float | None:
        """Density of the plan that lies at ``place`` between the first plan of a run, 0, and the last, 1."""
        if not isinstance(self.density, tuple):
            return self.density
        first, last = self.density
        return first + (last - first) * min(max(place, 0.0), 1.0)

    def replace(self, **changes: Any) -> Method:
        """Copy with some fields changed; :attr:`pictures` that do not go with the changes are left out.

        Raises:
            ValueError: for an unknown field (with the known ones) or a bad value.
        """
        known = {f.name for f in dataclasses.fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            close = difflib.get_close_matches(unknown[0], known, n=1)
            raise ValueError(
                f"unknown option {', '.join(map(repr, unknown))}; known are "
                + ", ".join(sorted(known - {"version"}))
                + (f"; did you mean {close[0]!r}?" if close else "")
            )
        if "block_q" in changes or "block_k" in changes:
            changes = {"hopper_blocks": None, **changes}
        if "pictures" in changes:
            return dataclasses.replace(self, **changes)
        pictures = tuple(pair for pair in self.pictures if pair[0] not in changes)
        try:
            return dataclasses.replace(self, pictures=pictures, **changes)
        except ValueError:
            if not pictures:
                raise
            return dataclasses.replace(self, pictures=(), **changes)  # raises too, if it was not for these

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
        hopper = "" if self.hopper_blocks is None else "; {} x {} on the Hopper kernel".format(*self.hopper_blocks)
        lines.append(f"  blocks      {self.block_q} x {self.block_k}{hopper}")
        if self.pictures:
            lines.append("  pictures    " + ", ".join(f"{name} {value}" for name, value in self.pictures))
        if not self.precision_rule.wide:
            lines.append(f"  precision   {self.precision}")
        lines.append(f"  schedule    warm-up {self.warmup:g}, end {self.end:g}, refresh {list(self.refresh)}")
        if self.reuse or self.dense_every:
            lines.append(f"  reuse       {', '.join(self.reuse) or 'none'}, dense every {self.dense_every}")
        if parse_spec(self.score).name == "window":
            lines.append(
                f"  window      {self.window}, stride {self.stride}, dilation {self.dilation}, causal {self.causal}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        """The slots as text."""
        return self.describe()


def _cost_of(registry: Registry[Any], spec: str, *args: Any) -> float:
    cost = registry.trait(spec, "cost", 0.0)
    return float(cost(*args)) if callable(cost) else float(cost)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
