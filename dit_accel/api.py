"""The one line: enable, disable, status."""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from dit_accel._specs import parse_spec
from dit_accel.adapter import Adapter
from dit_accel.blend import Blend
from dit_accel.ledger import Status
from dit_accel.logging import get_logger
from dit_accel.method import Method
from dit_accel.pattern import PATTERNS
from dit_accel.presets import get_method, load_methods
from dit_accel.registry import Installation, adapters, find_adapter, install
from dit_accel.runtime import ModelRun
from dit_accel.static_plan import Recorder, StaticPlan
from dit_accel_kernels.backends import BACKENDS

__all__ = [
    "Handle",
    "calibrate",
    "disable",
    "enable",
    "enabled",
    "methods",
    "status",
    "supported_models",
]

_logger = get_logger("dit_accel")
_COMPONENTS = ("transformer", "transformer_2", "transformer_3")
_SLOTS = {"order", "order_choice", "score", "select", "compensate"}
# Handles are kept alive by what is installed on the module, so that a dropped pipeline takes its handle along.
_handles: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Handle]] = weakref.WeakKeyDictionary()

Plans = StaticPlan | str | Path | Mapping[str, StaticPlan]


class Handle:
    """What :func:`enable` returns: undo, statistics, and a context manager that disables at the end.

    Attributes:
        method: the method in force.
        runs: run state of each transformer, by component name.
    """

    def __init__(self, method: Method, runs: dict[str, ModelRun], installed: dict[str, Installation]) -> None:
        self.method = method
        self.runs = runs
        self._installed = installed

    @property
    def active(self) -> bool:
        """Whether the acceleration is still in place."""
        return bool(self._installed)

    def disable(self, component: str | None = None) -> None:
        """Restore the original objects, of one component or of all. Safe to call twice."""
        for name in [component] if component is not None else list(self._installed):
            if name in self._installed:
                self._installed.pop(name).undo()
                self.runs[name].blends.clear()

    def blend(
        self,
        u: float,
        heads: Mapping[int, Collection[int] | None] | None = None,
        *,
        steps: Collection[int] | None = None,
        branch: str | None = None,
        component: str | None = None,
    ) -> Blend:
        """Blend the output of chosen heads with their values: ``O <- (1 - u) O + u V`` (SoftPAG, arXiv 2506.10978).

        On sparse and on dense calls alike, until :meth:`Blend.remove <dit_accel.blend.Blend.remove>` or :meth:`disable`.
        Several blends are applied one after the other.

        Args:
            u: weight of the values, from 0 to 1. A head with weight 1 attends to nothing but each token itself.
            heads: lists of heads by layer number, ``None`` for all heads of a layer; left out, all heads of all layers.
            steps: denoising steps at which it applies, such as ``range(5, 20)``; left out, all.
            branch: guidance branch, such as ``"uncond"``; left out, all.
            component: one transformer by name; left out, all of them.

        Returns:
            The blend, to remove it.

        Raises:
            ValueError: a value out of range, an unknown component, or a handle that is disabled.
        """
        if component is not None and component not in self._installed:
            raise ValueError(f"component must be one of {', '.join(self._installed) or 'none'}, got {component!r}")
        if not self._installed:
            raise ValueError("this handle is disabled; enable again before blending")
        made = Blend(u, heads, steps=steps, branch=branch)
        runs = [run for name, run in self.runs.items() if component in (None, name) and name in self._installed]
        for run in runs:
            made.check(len(run.layers))
        for run in runs:
            run.blends.append(made)
            made.on_remove(run.forget_blend)
        return made

    def stats(self) -> Status:
        """What each transformer computed in its latest run. Waits for the device."""
        return Status({name: run.status() for name, run in self.runs.items()})

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.disable()

    def __repr__(self) -> str:
        parts = ", ".join(f"{n}: {r.model} ({len(r.layers)} layers)" for n, r in self.runs.items())
        state = "active" if self.active else "disabled"
        return f"<dit_accel.Handle {self.method.name!r} {state}; {parts}>"


def _transformers(target: Any) -> dict[str, nn.Module]:
    """Transformers of a pipeline, or the transformer itself, by component name; compiled ones unwrapped."""
    found = (
        {"transformer": target} if isinstance(target, nn.Module) else {n: getattr(target, n, None) for n in _COMPONENTS}
    )
    modules = {name: getattr(m, "_orig_mod", m) for name, m in found.items() if isinstance(m, nn.Module)}
    if not modules:
        raise ValueError(
            "expected a diffusers pipeline with a transformer, or a transformer, got "
            f"{type(target).__name__} without any of {', '.join(_COMPONENTS)}"
        )
    return modules


def _plans(plan: Plans | None, names: Sequence[str]) -> dict[str, StaticPlan]:
    if plan is None:
        return {}
    if isinstance(plan, str | Path):
        plan = StaticPlan.load(plan)
    if isinstance(plan, StaticPlan):
        return dict.fromkeys(names, plan)
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


def enable(
    target: Any,
    method: str | Method | None = None,
    *,
    backend: str | None = None,
    min_tokens: int = 2048,
    run_density: float | None = None,
    plan: Plans | None = None,
    **overrides: Any,
) -> Handle:
    """Accelerate a pipeline or a transformer. Enabling again replaces what was in force.

    Args:
        target: a diffusers pipeline (all its transformers are accelerated), or one transformer.
        method: name from :func:`methods`, or a :class:`~dit_accel.Method`. Left out it is ``"auto"``, or where
            slots are given by keyword, a composition of these alone: ``enable(pipe, order="gilbert",
            score="xattn", select="top_p:0.9", compensate="mean")``.
        backend: kernel backend (``"hopper"``, ``"triton"``, ``"cpu"``, ``"reference"``); ``None`` takes the best
            that passes its self-test. The environment variable ``DIT_ACCEL_BACKEND`` sets a default.
        min_tokens: shorter sequences stay dense.
        run_density: work of the whole run over the work of a dense run, warm-up, planning and
            pooled keys included; the density of the sparse steps follows from it.
        plan: for static methods such as ``"paro"``, what :func:`calibrate` made, or its file.
        **overrides: fields of :class:`~dit_accel.Method`, such as ``density=0.3`` or ``warmup=0.1``.

    Returns:
        A handle with ``disable()`` and ``stats()``, usable as a context manager.

    Raises:
        ValueError: unknown method or option, a value out of range, a target without a transformer, a
            model that no adapter knows, or a static method without a plan.
        RuntimeError: if an explicitly requested backend cannot run here.
    """
    chosen = _choose(method, overrides)
    if run_density is not None and (not isinstance(run_density, int | float) or not 0 < run_density <= 1):
        raise ValueError(f"run_density must be above 0 and at most 1, got {run_density!r}")
    if not isinstance(min_tokens, int) or min_tokens < 0:
        raise ValueError(f"min_tokens must be a number of tokens, at least 0, got {min_tokens!r}")
    backend = backend or os.environ.get("DIT_ACCEL_BACKEND") or None
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    modules = _transformers(target)
    plans = _plans(plan, list(modules))
    if chosen.static and not plans:
        raise ValueError(
            f"method {chosen.name!r} is static: make a plan first with dit_accel.calibrate(pipe, "
            f"prompts, method={chosen.name!r}) and pass plan=..."
        )
    if plans:
        chosen = _method_of_plans(chosen, plans, modules, overrides, run_density)
    if run_density is not None and (not chosen.keeps_density or isinstance(chosen.density, tuple)):
        raise ValueError(
            f"run_density goes with a method that keeps a share of the blocks, not with select={chosen.select!r} and "
            f"density={chosen.density!r}"
        )
    runs = {}
    for name, module in modules.items():
        runs[name] = ModelRun(
            chosen,
            model=type(module).__name__,
            backend=backend,
            min_tokens=min_tokens,
            run_density=run_density,
            static=plans.get(name),
            module=module,
        )
    return _install(target, chosen, modules, runs)


def _choose(method: str | Method | None, overrides: dict[str, Any]) -> Method:
    """The method that was asked for: a known one with changes, or slots by keyword."""
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
    return chosen


def _compose(slots: dict[str, Any]) -> Method:
    """A method of slots alone. Where several orders are given, each head chooses by what its slots allow."""
    orders = slots.get("order", "raster")
    several = orders == "axes" or (not isinstance(orders, str) and len(orders) > 1)
    if several and "order_choice" not in slots:
        pattern = parse_spec(slots.get("score", "mass")).name in PATTERNS
        slots = {**slots, "order_choice": "mse" if pattern else "recall"}
    return Method(name="custom", summary="Slots given by keyword.").replace(**{"density": None, **slots})


def _install(target: Any, method: Method, modules: dict[str, nn.Module], runs: dict[str, ModelRun]) -> Handle:
    """Join runs to transformers; all of them or none."""
    pipe = None if isinstance(target, nn.Module) else target
    known = {name: find_adapter(module) for name, module in modules.items()}
    for name, module in modules.items():
        if known[name] is None:
            raise ValueError(
                f"{name} is a {type(module).__name__}, which no adapter knows; supported are "
                + ", ".join(m for a in adapters().values() for m in a.models)
            )
    before = {name: _runs_of(module) for name, module in modules.items()}
    for module in modules.values():
        _release(module)
    handle = Handle(method, runs, {})
    try:
        for name, module in modules.items():
            _join(handle, name, module, known[name], runs[name], pipe)
    except BaseException:
        handle.disable()
        for name, module in modules.items():  # what was in force stays in force
            if (run := before[name]) is not None:
                _join(Handle(run.method, {name: run}, {}), name, module, known[name], run, pipe)
        raise
    for run in runs.values():
        _logger.info(
            "%s: %d attention layers, method %s, density %s, backend %s",
            run.model,
            len(run.layers),
            method.name,
            run.run_density or method.density,
            run.backend or "automatic",
        )
    return handle


def _join(handle: Handle, name: str, module: nn.Module, adapter: Adapter | None, run: ModelRun, pipe: Any) -> None:
    """Install one run and note whose it is."""
    assert adapter is not None
    installed = install(module, adapter, run, pipe)
    handle._installed[name] = installed
    run.set_layers(installed.layers)
    installed.owner = handle
    _handles[module] = weakref.ref(handle)


def _holder(module: nn.Module) -> tuple[Handle, str] | None:
    """The active handle of a transformer and its name there."""
    held = _handles.get(module)
    handle = held() if held is not None else None
    if handle is None:
        return None
    for name, run in handle.runs.items():
        if run.module is module and name in handle._installed:
            return handle, name
    return None


def _runs_of(module: nn.Module) -> ModelRun | None:
    held = _holder(module)
    return None if held is None else held[0].runs[held[1]]


def _release(module: nn.Module) -> bool:
    """Undo what is installed on one transformer; whether there was anything."""
    held = _holder(module)
    if held is not None:
        held[0].disable(held[1])
    return held is not None


def disable(target: Any) -> bool:
    """Undo :func:`enable` on a pipeline or transformer; whether there was anything to undo."""
    return any([_release(module) for module in _transformers(target).values()])


@contextmanager
def enabled(target: Any, method: str | Method | None = None, **options: Any) -> Iterator[Handle]:
    """Accelerate within a ``with`` block; the options are those of :func:`enable`."""
    handle = enable(target, method, **options)
    try:
        yield handle
    finally:
        handle.disable()


def status(target: Any) -> Status:
    """What each accelerated transformer of ``target`` computed in its latest run, by component name.

    A transformer that is not accelerated is left out. Waits for the device.
    """
    runs = {name: _runs_of(module) for name, module in _transformers(target).items()}
    return Status({name: run.status() for name, run in runs.items() if run is not None})


def methods() -> list[Method]:
    """The methods that ship."""
    return list(load_methods().values())


def supported_models() -> list[dict[str, Any]]:
    """Supported transformer classes: ``model``, ``family``, ``task``, ``blocks`` and ``note`` of each."""
    rows = []
    for adapter in adapters().values():
        row = {k: v for k, v in asdict(adapter).items() if k not in ("geometry", "models", "name")}
        rows += [{"model": model, "family": adapter.name, **row} for model in adapter.models]
    return rows


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    method: str | Method = "paro",
    *,
    component: str = "transformer",
    overrides: Mapping[str, Any] | None = None,
    **call: Any,
) -> StaticPlan:
    """Find the static plan of one transformer by dense runs, two for each prompt.

    The first pass finds the token order of each head, the second the mass of each block in it. Methods with a pattern
    and candidate windows (``"sta_search"``) need one pass only.

    Args:
        pipe: a diffusers pipeline.
        prompts: what to run; PAROAttention uses one or two.
        method: a static method.
        component: the transformer to plan.
        overrides: fields of the method to change, such as ``{"density": 0.5}``.
        **call: further arguments of the pipeline call; steps and size must be those of later use.

    Returns:
        The plan; give it to :func:`enable`, or :meth:`~dit_accel.StaticPlan.save` it.

    Raises:
        ValueError: no prompts, a method that is not static, an unknown component, or no attention
            that could be planned.
    """
    chosen = get_method(method).replace(**dict(overrides or {}))
    modules = _transformers(pipe)
    if not prompts or isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of at least one prompt, got {prompts!r}")
    if not chosen.static:
        raise ValueError(f"method {chosen.name!r} needs no calibration, it plans during the run")
    if component not in modules:
        raise ValueError(f"component must be one of {', '.join(modules)}, got {component!r}")
    module = modules[component]
    run = ModelRun(chosen, model=type(module).__name__, min_tokens=0, module=module)
    run.recorder = Recorder(chosen)
    with _install(pipe, chosen, {component: module}, {component: run}):
        for phase in run.recorder.phases:
            if phase == "mask":
                run.recorder.next_phase()
            for prompt in prompts:
                pipe(prompt=prompt, **call)
        return run.recorder.finish(run)
