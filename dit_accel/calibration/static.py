"""Static plans by dense runs, as :class:`dit_accel.static_plan.Recorder` finds them; what is done is kept on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dit_accel.api import _install
from dit_accel.calibration.folder import WorkFolder
from dit_accel.calibration.run import Progress, ProgressFn, made_on
from dit_accel.geometry import TokenGeometry
from dit_accel.method import Method
from dit_accel.profiles import ComponentProfile, Profile, fingerprint
from dit_accel.registry import find_adapter
from dit_accel.runtime import ModelRun
from dit_accel.static_plan import Recorder, StaticPlan

__all__ = ["calibrate_static", "profile_of"]


def calibrate_static(
    pipe: Any,
    module: nn.Module,
    component: str,
    prompts: Sequence[str],
    method: Method,
    *,
    folder: str | Path | None,
    progress: ProgressFn | None,
    call: Mapping[str, Any],
) -> StaticPlan:
    """Find the static plan of one transformer.

    Args:
        pipe: a diffusers pipeline.
        module: its transformer.
        component: the transformer's name.
        prompts: what to run.
        method: a static method.
        folder: where it keeps what is done, to go on there; left out, nothing is kept.
        progress: called before each run and at the end.
        call: further arguments of the pipeline call.

    Raises:
        ValueError: if no attention could be planned, or the folder holds another calibration.
    """
    run = ModelRun(method, model=type(module).__name__, min_tokens=0, module=module)
    recorder = run.recorder = Recorder(method)
    settings = {
        "version": 1,
        "method": method.to_dict(),
        "prompts": list(prompts),
        "call": {key: repr(value) for key, value in sorted(call.items())},
        "models": {component: [type(module).__name__, fingerprint(module).to_dict()]},
    }
    work = None if folder is None else WorkFolder(folder, settings)
    total = len(recorder.phases) * len(prompts)
    done = 0 if work is None else _restore(recorder, work)
    tell = progress if progress is not None else (lambda _: None)
    with _install(pipe, method, {component: module}, {component: run}):
        for index in range(total):
            phase, prompt = divmod(index, len(prompts))
            if recorder.phases[phase] == "mask" and prompt == 0:
                recorder.next_phase()
            if index < done:
                continue
            tell(Progress(index, total, f"prompt {prompt + 1} dense, {recorder.phases[phase]}"))
            pipe(prompt=prompts[prompt], **call)
            if work is not None:
                _keep(recorder, work, index + 1)
        found = recorder.finish(run)
    tell(Progress(total, total, "done"))
    return found


def _keep(recorder: Recorder, work: WorkFolder, done: int) -> None:
    """Write the sums of a recorder."""
    geometry = recorder._geometry
    tensors = {f"order.{layer}": x for layer, x in recorder._order_scores.items()}
    tensors |= {f"mass.{index}.{layer}": x for (index, layer), x in recorder._mass.items()}
    place = None if geometry is None else [geometry.grid and list(geometry.grid), geometry.prefix, geometry.suffix]
    visual = None if geometry is None else geometry.visual
    work.put_tensors("sums", tensors, {"done": done, "geometry": place, "visual": visual, "steps": recorder._steps})


def _restore(recorder: Recorder, work: WorkFolder) -> int:
    """Read what :func:`_keep` wrote; how many runs it holds."""
    found = work.tensors("sums")
    if found is None:
        return 0
    tensors, meta = found
    if meta["geometry"] is not None:
        grid, prefix, suffix = meta["geometry"]
        recorder._geometry = TokenGeometry(grid and tuple(grid), prefix, suffix, meta["visual"])
    recorder._steps = meta["steps"]
    for name, tensor in tensors.items():
        _put(recorder, name, tensor)
    return int(meta["done"])


def _put(recorder: Recorder, name: str, tensor: Tensor) -> None:
    kind, *place = name.split(".")
    if kind == "order":
        recorder._order_scores[int(place[0])] = tensor
    else:
        recorder._mass[int(place[0]), int(place[1])] = tensor


def profile_of(plan: StaticPlan, module: nn.Module, component: str, target: str) -> Profile:
    """A static plan as a profile."""
    adapter = find_adapter(module)
    layers, heads = plan.bits.shape[1:3]
    part = ComponentProfile(
        model=plan.model,
        fingerprint=fingerprint(module),
        geometry=plan.geometry,
        layers=tuple(f"layer {i}" for i in range(layers)),
        heads=heads,
        plan=plan,
    )
    return Profile(
        method=plan.method,
        components={component: part},
        control="plan",
        target=target,
        task="" if adapter is None else adapter.task,
        steps=plan.steps,
        made_on=made_on(),
    )
