"""The one line: enable, disable, status."""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

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
from dit_accel.static_plan import StaticPlan
from dit_accel_kernels.backends import BACKENDS

if TYPE_CHECKING:
    from dit_accel.calibration.run import ProgressFn
    from dit_accel.cost import CostModel
    from dit_accel.profiles import Profile

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
_MIN_TOKENS = 2048
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
    min_tokens: int | None = None,
    run_density: float | None = None,
    quality: str | None = None,
    target_psnr: float | None = None,
    target_error: float | None = None,
    profile: Profile | str | Path | None = None,
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
        min_tokens: shorter sequences stay dense. Left out it is 2048, and where neither a method nor how it is to
            run was given, calls also stay dense on a GPU where sparse attention was measured not to be faster (see
            :mod:`dit_accel.cost`; ``DIT_ACCEL_COST_MODEL=off`` switches that off).
        run_density: work of the whole run over the work of a dense run, warm-up, planning and
            pooled keys included; the density of the sparse steps follows from it.
        quality: ``"high"``, ``"balanced"`` or ``"fast"``: 40, 35 or 30 dB, as ``target_psnr``.
        target_psnr: mean PSNR against dense in dB. It is reached by the error of attention that gave it where it was
            measured: in the calibration of ``profile``, else on a small model, with a warning for others.
        target_error: relative L2 error of each layer's attention output, above 0 and below 1. It is measured where
            plans are made, and each head gets the density that it takes (:class:`~dit_accel.targets.control.ErrorControl`).
        profile: what ``calibrate(pipe, prompts, target=...)`` found: a :class:`~dit_accel.profiles.Profile`, its file or
            folder, or its name on the Hugging Face Hub. It fixes the method; a quality or target may be given besides.
        plan: for static methods such as ``"paro"``, what :func:`calibrate` made, or its file.
        **overrides: fields of :class:`~dit_accel.Method`, such as ``density=0.3`` or ``warmup=0.1``.

    Returns:
        A handle with ``disable()`` and ``stats()``, usable as a context manager.

    Raises:
        ValueError: unknown method or option, a value out of range, a target without a transformer, a
            model that no adapter knows, a static method without a plan, or a profile of another model.
        FileNotFoundError: if there is no plan or profile at the path.
        RuntimeError: if an explicitly requested backend cannot run here.
    """
    from dit_accel.targets.wish import Wish

    wish = Wish(quality, target_psnr, target_error, profile)
    wish.check({"run_density": run_density, "density": overrides.get("density"), "plan": plan})
    if profile is not None and overrides:
        raise ValueError(f"a profile fixes the method; {', '.join(sorted(overrides))} cannot go with it")
    if min_tokens is not None and (not isinstance(min_tokens, int) or min_tokens < 0):
        raise ValueError(f"min_tokens must be a number of tokens, at least 0, got {min_tokens!r}")
    backend = backend or os.environ.get("DIT_ACCEL_BACKEND") or None
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    modules = _transformers(target)
    if profile is not None:
        granted = wish.grant_by_profile(method, modules, backend)
    else:
        chosen, plans = _with_plans(method, overrides, modules, run_density, plan)
        granted = wish.grant(chosen, modules, backend)
        granted.plans.update(plans)
    for warning in granted.warnings:
        _logger.warning("%s", warning)
    nothing_said = method is None and not overrides and run_density is None and plan is None and profile is None
    automatic = nothing_said and min_tokens is None and backend is None
    runs = {}
    for name, module in modules.items():
        runs[name] = ModelRun(
            granted.methods[name],
            model=type(module).__name__,
            backend=backend,
            min_tokens=_MIN_TOKENS if min_tokens is None else min_tokens,
            run_density=run_density,
            static=granted.plans.get(name),
            module=module,
            control=granted.controls.get(name),
            cost=_cost_model() if automatic else None,
        )
    return _install(target, next(iter(granted.methods.values())), modules, runs)


def _cost_model() -> CostModel:
    from dit_accel.cost import CostModel

    return CostModel()


def _with_plans(
    method: str | Method | None,
    overrides: dict[str, Any],
    modules: Mapping[str, nn.Module],
    run_density: float | None,
    plan: Plans | None,
) -> tuple[Method, dict[str, StaticPlan]]:
    """The method that was asked for, and static plans by component."""
    chosen = _choose(method, overrides)
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


@overload
def calibrate(
    pipe: Any, prompts: Sequence[str], method: str | Method | None = None, *, target: None = None, **options: Any
) -> StaticPlan: ...


@overload
def calibrate(
    pipe: Any, prompts: Sequence[str], method: str | Method | None = None, *, target: str, **options: Any
) -> Profile: ...


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    method: str | Method | None = None,
    *,
    target: str | None = None,
    component: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    progress: ProgressFn | None = None,
    control: str = "density",
    errors: Sequence[float] = (),
    fix_orders: bool = True,
    seed: int = 0,
    **call: Any,
) -> StaticPlan | Profile:
    """Find out how a pipeline's attention is best computed, by a few runs.

    With a ``target``, a profile for all transformers of the pipeline. Dense runs of the prompts tell what each head would
    lose at several densities, under the plans that the method would make; densities are then allotted so that each block
    removes as much error as any other, and accelerated runs measure the PSNR, up to three for each prompt.

    Without, the static plan of one transformer, for methods such as ``"paro"``. The first pass of dense runs finds the
    token order of each head, the second the mass of each block in it; methods with a pattern and candidate windows
    (``"sta_search"``) need one pass only. With a target of the kind ``"density:0.4"`` a static method's plan comes as a
    profile.

    Args:
        pipe: a diffusers pipeline.
        prompts: what to run; PAROAttention uses one or two, a PSNR wants four and more.
        method: left out, ``"auto"`` with a target and ``"paro"`` without.
        target: ``"psnr:35"`` in dB against dense, ``"error:0.05"``, the relative L2 error of attention, ``"density:0.3"``,
            the mean share of the map on sparse steps, or ``"high"``, ``"balanced"``, ``"fast"``.
        component: the transformer to plan, for static methods; ``"transformer"`` if left out.
        overrides: fields of the method to change, such as ``{"density": 0.5}``.
        folder: where what is done is kept, so that a calibration that was stopped goes on; left out, nothing is kept.
        progress: called with a :class:`~dit_accel.calibration.run.Progress` before each run and at the end.
        control: what the profile does later on: ``"density"`` gives each head the density that was allotted, ``"error"``
            keeps the error that gave the PSNR, measured anew whenever a plan is made.
        errors: further errors whose PSNR is measured, for targets to come.
        fix_orders: whether heads keep the order that they chose most often, where densities are allotted.
        seed: of the first prompt's noise, the others follow; for targets.
        **call: further arguments of the pipeline call; steps and size should be those of later use.

    Returns:
        The profile or the plan; give it to :func:`enable`, or save it.

    Raises:
        ValueError: no prompts, a method without a plan to find or a target that it cannot have, an unknown component, no
            attention that could be watched, or a folder with another calibration.
    """
    name = method if method is not None else ("paro" if target is None else "auto")
    chosen = get_method(name).replace(**dict(overrides or {}))
    modules = _transformers(pipe)
    if not prompts or isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of at least one prompt, got {prompts!r}")
    from dit_accel.targets.named import parse_target

    wanted = None if target is None else parse_target(target)
    if component is not None and component not in modules:
        raise ValueError(f"component must be one of {', '.join(modules)}, got {component!r}")
    if not chosen.static:
        if wanted is None:
            raise ValueError(
                f"method {chosen.name!r} needs no calibration, it plans during the run; give target= for a profile"
            )
        from dit_accel.calibration.run import Calibration

        kept = modules if component is None else {component: modules[component]}
        options: dict[str, Any] = {"control": control, "errors": errors, "fix_orders": fix_orders, "seed": seed}
        options |= {"folder": folder, "progress": progress, "call": call}
        return Calibration(pipe, kept, prompts, chosen, wanted, **options).run()
    from dit_accel.calibration.static import calibrate_static, profile_of

    if wanted is not None and wanted.kind != "density":
        raise ValueError(f"method {chosen.name!r} is static: its target is a density ('density:0.4'), got {target!r}")
    if wanted is not None:
        chosen = chosen.replace(density=wanted.value)
    component = component or next(iter(modules))
    plan = calibrate_static(
        pipe, modules[component], component, prompts, chosen, folder=folder, progress=progress, call=call
    )
    return plan if wanted is None else profile_of(plan, modules[component], component, str(wanted))
