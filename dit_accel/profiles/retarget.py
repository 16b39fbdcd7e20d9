"""Another target from the same measurements: densities of a profile allotted anew."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dit_accel.method import Method
from dit_accel.profiles.profile import ANY_BRANCH, ComponentProfile, ErrorCurve, Profile
from dit_accel.targets.allot import FINE, allot_error, allot_work, refine
from dit_accel.targets.named import Target

__all__ = ["densities_for", "expected_error", "retarget"]

_MOST_ERROR = 0.95


def _joined(curve: ErrorCurve) -> ErrorCurve:
    """The curve of layers, where heads have no densities of their own: ``[D, P, L, 1]``."""
    if curve.by_head:
        return curve
    total = curve.output.sum(-1, keepdim=True)
    error = (curve.error * curve.output).sum(-1, keepdim=True) / total.clamp(min=1e-12)
    return ErrorCurve(curve.densities, error, total)


def _weights(curve: ErrorCurve, starts: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Weights of squared errors and of work, ``[P, L, H]``: a part counts by its length, all layers alike.

    Inside a layer a head's error counts by its share of the layer's squared output.
    """
    ends = torch.tensor([*starts[1:], 1.0])
    length = (ends - torch.tensor(starts))[:, None, None].expand_as(curve.output)
    layers = curve.output.shape[1]
    return length * curve.output / layers, length


def _steepness(method: Method, starts: tuple[float, ...]) -> list[float]:
    """Density of each part over the mean of the two ends, where the method's density falls over the run; else 1."""
    if not isinstance(method.density, tuple):
        return [1.0] * len(starts)
    mean, span = sum(method.density) / 2, max(method.end - method.warmup, 1e-6)
    middles = [(max(a, method.warmup) + b) / 2 for a, b in zip(starts, [*starts[1:], method.end], strict=True)]
    return [(method.density_at((middle - method.warmup) / span) or mean) / mean for middle in middles]


def densities_for(
    part: ComponentProfile, method: Method, *, error: float | None = None, density: float | None = None
) -> Tensor:
    """Densities ``[P, L, H]`` that keep an error with the least work, or a mean density with the least error.

    The error is the root of the mean squared relative error of the layers' attention outputs over the run. A method whose
    density falls over the run keeps its steepness: parts are allotted apart, each with its share of the density, or with an
    error that rises as the density falls.

    Raises:
        ValueError: if the profile holds no measurements, or not exactly one wish is given.
    """
    if part.curve is None:
        raise ValueError(
            "the profile holds no errors of attention, so that no other target can be met; calibrate again"
        )
    if (error is None) == (density is None):
        raise ValueError(f"give either an error or a density, got error={error!r}, density={density!r}")
    curve = _joined(part.curve)
    weight, work = _weights(curve, part.starts)
    table = refine(curve.densities, curve.error)
    steep = _steepness(method, part.starts)
    if len(set(steep)) == 1:
        found = _allot(table, weight, work, error, density)
    else:
        lengths = [b - max(a, method.warmup) for a, b in zip(part.starts, [*part.starts[1:], method.end], strict=True)]
        mean = sum(s * n for s, n in zip(steep, lengths, strict=True)) / sum(lengths)
        rows = []
        for index, own in enumerate(steep):
            wanted = None if error is None else min(error / own, _MOST_ERROR)
            share = None if density is None else min(density * own / mean, 1.0)
            rows.append(_allot(table[:, index], weight[index] / weight[index].sum(), work[index], wanted, share))
        found = torch.stack(rows)
    return found.expand(part.curve.output.shape).contiguous()


def _allot(table: Tensor, weight: Tensor, work: Tensor, error: float | None, density: float | None) -> Tensor:
    """Densities of the shape of ``weight``; ``table`` has one axis more in front."""
    flat = table.flatten(1), weight.flatten()
    found = (
        allot_work(*flat, density, work.flatten())
        if density is not None
        else allot_error(*flat, error or 0, work.flatten())
    )
    return found.view(weight.shape)


def expected_error(part: ComponentProfile, density: Tensor) -> float:
    """The error that the measurements let expect of densities ``[P, L, H]``."""
    assert part.curve is not None
    weight = _weights(part.curve, part.starts)[0].flatten()
    table = refine(part.curve.densities, part.curve.error).flatten(1)
    fine = torch.tensor(FINE)
    index = (fine[:, None] <= density.flatten()[None] + 1e-6).sum(0).clamp(1, len(FINE)) - 1
    return float((table.gather(0, index[None])[0] * weight).sum().sqrt())


def retarget(profile: Profile, target: Target) -> Profile:
    """The profile for another target, from what it holds.

    Raises:
        ValueError: if it does not hold what that takes.
    """
    if profile.control == "plan":
        raise ValueError(
            f"a profile with static plans has no other targets, got {target}; calibrate with another density"
        )
    if target.kind == "psnr":
        if profile.curve is None:
            raise ValueError(
                f"the profile holds no PSNR by error, so that {target} cannot be met; calibrate with target="
            )
        error = profile.curve.error_for(target.value)
        notes = (
            [] if profile.curve.covers(target.value) else [f"{target} lies outside of what the profile has measured"]
        )
        return dataclasses.replace(
            _with_error(profile, error), target=str(target), measured={}, notes=(*profile.notes, *notes)
        )
    if target.kind == "error":
        return dataclasses.replace(_with_error(profile, target.value), target=str(target), measured={})
    if profile.control == "error":
        raise ValueError(f"a profile that keeps an error while it runs takes no density, got {target}")
    parts = {
        name: dataclasses.replace(part, density={ANY_BRANCH: densities_for(part, profile.method, density=target.value)})
        for name, part in profile.components.items()
    }
    return dataclasses.replace(profile, components=parts, target=str(target), error=None, measured={})


def _with_error(profile: Profile, error: float) -> Profile:
    if profile.control == "error":
        return dataclasses.replace(profile, error=error)
    parts = {
        name: dataclasses.replace(part, density={ANY_BRANCH: densities_for(part, profile.method, error=error)})
        for name, part in profile.components.items()
    }
    return dataclasses.replace(profile, components=parts, error=error)
