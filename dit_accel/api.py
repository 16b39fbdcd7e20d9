"""The one line: enable, disable, status."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from torch import nn

from dit_accel.adapter import Adapter
from dit_accel.asked import Plans, transformers_of, with_plans
from dit_accel.handle import Handle
from dit_accel.ledger import Status
from dit_accel.logging import get_logger
from dit_accel.method import Method
from dit_accel.presets import get_method, load_methods
from dit_accel.registry import adapters, find_adapter, install
from dit_accel.runtime import ModelRun
from dit_accel.static_plan import StaticPlan
from dit_accel_kernels.backends import BACKENDS

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dit_accel.calibration.run import ProgressFn
    from dit_accel.cost import CostModel
    from dit_accel.options import MethodOptions
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
_MIN_TOKENS = 2048
# Handles are kept alive by what is installed on the module, so that a dropped pipeline takes its handle along.
_handles: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Handle]] = weakref.WeakKeyDictionary()


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
    **overrides: Unpack[MethodOptions],
) -> Handle:
    """Accelerate a pipeline or a transformer. Enabling again replaces what was in force.

    Args:
        target: a diffusers pipeline (all its transformers are accelerated), or one transformer.
        method: name from :func:`methods`, or a :class:`~dit_accel.Method`. Left out it is ``"auto"``, or where
            slots are given by keyword, a composition of these alone: ``enable(pipe, order="gilbert",
            score="antidiagonal", select="top_p:0.9", compensate="mean")``.
        backend: kernel backend (``"hopper"``, ``"triton"``, ``"cpu"``, ``"flex"``, ``"flash4"``, ``"reference"``);
            ``None`` takes the best that passes its self-test. One that cannot run raises at the first sparse call, with
            the reason. The environment variable ``DIT_ACCEL_BACKEND`` sets a default.
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
        A handle with ``disable()`` and ``status()``, usable as a context manager.

    Raises:
        ValueError: unknown method or option, a value out of range, a target without a transformer, a
            model that no adapter knows, a static method without a plan, or a profile of another model.
        TypeError: a method, plan or profile that is of no kind it can be.
        FileNotFoundError: if there is no plan or profile at the path.
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
    modules = transformers_of(target)
    if profile is not None:
        granted = wish.grant_by_profile(method, modules, backend)
    else:
        chosen, plans = with_plans(method, dict(overrides), modules, run_density, plan)
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
    return any([_release(module) for module in transformers_of(target).values()])


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
    runs = {name: _runs_of(module) for name, module in transformers_of(target).items()}
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
    modules = transformers_of(pipe)
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
