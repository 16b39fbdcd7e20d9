"""What a call of :func:`dit_accel.enable` asks for: transformers, a method, and static plans."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dit_accel._specs import parse_spec
from dit_accel.method import Method
from dit_accel.pattern import PATTERNS
from dit_accel.presets import get_method
from dit_accel.static_plan import StaticPlan

__all__ = ["Plans", "choose", "transformers_of", "with_plans"]

_COMPONENTS = ("transformer", "transformer_2", "transformer_3")
_SLOTS = {"order", "order_choice", "score", "select", "compensate"}
_WINDOW = {"window": None, "stride": 1, "dilation": 1, "causal": False}
_FIELDS = sorted({f.name for f in dataclasses.fields(Method)} - {"name", "summary", "paper", "version"})
_OPTIONS = ("backend", "min_tokens", "plan", "profile", "quality", "run_density", "target_error", "target_psnr")
# What other libraries call it.
_ELSEWHERE = {
    "sparsity": "density, which is 1 - sparsity",
    "topk": "density, the share of the blocks that is computed",
    "block_size": "block_q and block_k",
    "warmup_steps": "warmup, a share of the steps such as 0.2",
    "skip_layers": "dense_layers",
}

Plans = StaticPlan | str | Path | Mapping[str, StaticPlan]


def transformers_of(target: Any) -> dict[str, nn.Module]:
    """Transformers of a pipeline, or the transformer itself, by component name; compiled ones unwrapped."""
    found = (
        {"transformer": target} if isinstance(target, nn.Module) else {n: getattr(target, n, None) for n in _COMPONENTS}
    )
    modules = {name: getattr(m, "_orig_mod", m) for name, m in found.items() if isinstance(m, nn.Module)}
    if not modules:
        unet = "; pipelines with a U-Net are not supported" if getattr(target, "unet", None) is not None else ""
        raise ValueError(
            "expected a diffusers pipeline with a transformer, or a transformer, got "
            f"{type(target).__name__} without any of {', '.join(_COMPONENTS)}{unet}"
        )
    return modules


def _plans(plan: Plans | None, names: Sequence[str]) -> dict[str, StaticPlan]:
    if plan is None:
        return {}
    if isinstance(plan, str | Path):
        plan = StaticPlan.load(plan)
    if isinstance(plan, StaticPlan):
        return dict.fromkeys(names, plan)
    if not isinstance(plan, Mapping):
        raise TypeError(f"plan must be a StaticPlan, its file or a mapping by component, got {type(plan).__name__}")
    return dict(plan)


def _method_of_plans(
    asked: Method,
    plans: dict[str, StaticPlan],
    modules: Mapping[str, nn.Module],
    overrides: Mapping[str, Any],
    run_density: float | None,
) -> Method:
    """The method that static plans were made for.

    Raises:
        ValueError: if the plans do not belong to these transformers, or other choices were asked for besides.
    """
    if overrides or run_density is not None:
        given = sorted([*overrides, *(["run_density"] if run_density is not None else [])])
        raise ValueError(
            f"a static plan fixes the method; {', '.join(given)} must be given to calibrate(), not beside plan="
        )
    for name, plan in plans.items():
        if name not in modules:
            raise ValueError(f"plan= names {name!r}; the transformers are {', '.join(modules)}")
        if plan.method.name != asked.name:
            raise ValueError(f"the static plan was made for method {plan.method.name!r}, got method={asked.name!r}")
        if plan.model != type(modules[name]).__name__:
            raise ValueError(f"the static plan was made for {plan.model}, {name} is a {type(modules[name]).__name__}")
    found = {plan.method for plan in plans.values()}
    if len(found) > 1:
        raise ValueError("the static plans of one pipeline must have one method; these differ in their options")
    return found.pop()


def with_plans(
    method: str | Method | None,
    overrides: dict[str, Any],
    modules: Mapping[str, nn.Module],
    run_density: float | None,
    plan: Plans | None,
) -> tuple[Method, dict[str, StaticPlan]]:
    """The method that was asked for, and static plans by component."""
    chosen = choose(method, overrides)
    if run_density is not None and (not isinstance(run_density, int | float) or not 0 < run_density <= 1):
        raise ValueError(f"run_density must be above 0 and at most 1, got {run_density!r}")
    plans = _plans(plan, list(modules))
    if chosen.static and not plans:
        raise ValueError(
            f"method {chosen.name!r} is static: make a plan first with dit_accel.calibrate(pipe, "
            f"prompts, method={chosen.name!r}) and pass plan=..."
        )
    if plans:
        chosen = _method_of_plans(chosen, plans, modules, overrides, run_density)
    if run_density is not None and not chosen.keeps_density:
        raise ValueError(
            f"run_density goes with a method that keeps a share of the blocks, not with select={chosen.select!r} and "
            f"density={chosen.density!r}"
        )
    return chosen, plans


def choose(method: str | Method | None, overrides: dict[str, Any]) -> Method:
    """The method that was asked for: a known one with changes, or slots by keyword."""
    _check_names(overrides)
    if method is None and not _SLOTS & set(overrides):
        method = "auto"
    if method is not None:
        chosen = get_method(method).replace(**overrides) if overrides else get_method(method)
    else:
        chosen = _compose(overrides)
    if "select" in overrides and chosen.is_geometric:
        raise ValueError(
            f"select={overrides['select']!r} cannot go with score={chosen.score!r}: a pattern has chosen its blocks "
            "already; leave select out, or give a score that looks at the data"
        )
    idle = [name for name, nothing in _WINDOW.items() if overrides.get(name, nothing) != nothing]
    if idle and parse_spec(chosen.score).name != "window":
        raise ValueError(
            f"{', '.join(idle)} would do nothing with method {chosen.name!r}, whose score is {chosen.score!r}; "
            "use method 'na', 'gna' or 'dina', or score='window'"
        )
    return chosen


def _check_names(overrides: Mapping[str, Any]) -> None:
    """Refuse a keyword that neither a method nor ``enable`` has, with the one that was probably meant."""
    unknown = sorted(set(overrides) - set(_FIELDS) - {"name", "summary", "paper", "version"})
    if not unknown:
        return
    close = difflib.get_close_matches(unknown[0], [*_FIELDS, *_OPTIONS], n=1)
    meant = _ELSEWHERE.get(unknown[0]) or (repr(close[0]) if close else None)
    hint = f", did you mean {meant}?" if meant else ";"
    raise ValueError(
        f"unknown option {', '.join(map(repr, unknown))}{hint} fields of a method are {', '.join(_FIELDS)}; further "
        f"options of enable are {', '.join(_OPTIONS)}"
    )


def _compose(slots: dict[str, Any]) -> Method:
    """A method of slots alone. Where several orders are given, each head chooses by what its slots allow."""
    orders = slots.get("order", "raster")
    several = orders == "axes" or (isinstance(orders, list | tuple) and len(orders) > 1)
    if several and "order_choice" not in slots:
        pattern = parse_spec(slots.get("score", "mass")).name in PATTERNS
        slots = {**slots, "order_choice": "mse" if pattern else "recall"}
    return Method(name="custom", summary="Slots given by keyword.").replace(**{"density": None, **slots})
