"""A profile: what calibration found about one pipeline, and how it is to run from then on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_accel.geometry import TokenGeometry
from dit_accel.method import Method
from dit_accel.profiles.fingerprint import Fingerprint
from dit_accel.static_plan import StaticPlan
from dit_accel.targets.quality import QualityCurve

__all__ = ["ANY_BRANCH", "PROFILE_VERSION", "ComponentProfile", "ErrorCurve", "Profile"]

PROFILE_VERSION = 1
#: Branch of densities that hold for every guidance branch without densities of its own.
ANY_BRANCH = "*"
#: The precision of every layer that the method's own is used for; nothing else can be computed yet.
METHOD_PRECISION = "method"

_CONTROLS = ("density", "error", "plan")


@dataclass(frozen=True, eq=False)
class ErrorCurve:
    """Squared errors of attention as calibration measured them, from which densities for any target follow.

    Attributes:
        densities: rising, below 1.
        error: float32 ``[D, P, L, H]``, squared error over squared output of each head, by density and part of the run.
        output: float32 ``[P, L, H]``, the head's share of the squared output of its layer.
        by_head: whether each head can have a density; otherwise the method spreads that of a layer over its heads.
    """

    densities: tuple[float, ...]
    error: Tensor
    output: Tensor
    by_head: bool = True

    def __post_init__(self) -> None:
        expected = [len(self.densities), *self.output.shape]
        if self.output.ndim != 3 or list(self.error.shape) != expected:
            raise ValueError(
                f"an error curve has output [P, L, H] and error [D, P, L, H] for D={len(self.densities)}, got "
                f"{list(self.output.shape)} and {list(self.error.shape)}"
            )


@dataclass(frozen=True, eq=False)
class ComponentProfile:
    """What is known about one transformer.

    Attributes:
        model: class name.
        fingerprint: of its configuration and shapes.
        geometry: where the tokens sat.
        layers: module paths of its self-attention layers.
        heads: attention heads of each layer.
        starts: shares of the run at which the parts begin that have densities of their own; the first is 0.
        density: float32 ``[P, L, H]`` by guidance branch, :data:`ANY_BRANCH` for those without an entry.
        orders: token order of each head by layer; empty where heads choose anew in each run.
        precision: of each layer; ``"method"`` is what the method says.
        dense_layers: layers that stay dense.
        curve: what was measured, or ``None``.
        plan: of a static method, or ``None``.
    """

    model: str
    fingerprint: Fingerprint
    geometry: TokenGeometry
    layers: tuple[str, ...]
    heads: int
    starts: tuple[float, ...] = (0.0,)
    density: Mapping[str, Tensor] = field(default_factory=dict)
    orders: tuple[tuple[str, ...], ...] = ()
    precision: tuple[str, ...] = ()
    dense_layers: tuple[int, ...] = ()
    curve: ErrorCurve | None = None
    plan: StaticPlan | None = None

    def __post_init__(self) -> None:
        """Check everything against everything."""
        count, shape = len(self.layers), (len(self.starts), len(self.layers), self.heads)
        _require(count > 0 and self.heads > 0, "layers and heads", (count, self.heads), "positive")
        rising = list(self.starts) == sorted(set(self.starts)) and self.starts[:1] == (0.0,) and self.starts[-1] < 1
        _require(rising, "starts", self.starts, "rising shares of the run from 0.0 to below 1")
        for branch, density in self.density.items():
            _require(tuple(density.shape) == shape, f"density[{branch!r}]", tuple(density.shape), f"of shape {shape}")
            ok = bool(torch.isfinite(density).all() and (density > 0).all() and (density <= 1).all())
            _require(ok, f"density[{branch!r}]", "values outside", "above 0 and at most 1 everywhere")
        sized = not self.orders or [len(row) for row in self.orders] == [self.heads] * count
        _require(sized, "orders", [len(row) for row in self.orders], f"{count} lists of {self.heads} orders")
        _require(len(self.precision) in (0, count), "precision", self.precision, f"{count} entries or none")
        other = sorted(set(self.precision) - {METHOD_PRECISION})
        _require(not other, "precision", other, f"{METHOD_PRECISION!r}, nothing else can be computed by this version")
        _require(all(0 <= i < count for i in self.dense_layers), "dense_layers", self.dense_layers, f"below {count}")
        if self.curve is not None:
            found = tuple(self.curve.output.shape)
            _require(found == shape, "curve", found, f"of parts, layers and heads {shape}")

    def densities(self, branch: str) -> Tensor | None:
        """Densities ``[P, L, H]`` of a guidance branch, ``None`` where the profile holds none."""
        return self.density.get(branch, self.density.get(ANY_BRANCH))

    def part(self, progress: float) -> int:
        """The part of the run in which ``progress``, a share of it, lies."""
        return sum(progress >= start - 1e-6 for start in self.starts) - 1


@dataclass(frozen=True, eq=False)
class Profile:
    """How to run a pipeline, and what was measured about it.

    Attributes:
        method: the method.
        components: by component name, such as ``"transformer"``.
        control: ``"density"`` for the densities of the components, ``"error"`` for an error that is kept while plans are
            made, ``"plan"`` for static plans.
        target: what was asked for, a spec such as ``"psnr:35"``.
        error: relative error of attention that the densities were allotted for or that is kept, or ``None``.
        task: ``"video"`` or ``"image"``.
        steps: denoising steps.
        curve: PSNR against dense by error, if it was measured.
        measured: further results, plain JSON types.
        made_on: GPU and versions.
        name: short name.
        notes: what has been done to the profile since, such as fitting it to another grid.
    """

    method: Method
    components: Mapping[str, ComponentProfile]
    control: str = "density"
    target: str = ""
    error: float | None = None
    task: str = ""
    steps: int = 0
    curve: QualityCurve | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)
    made_on: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check that it can be used."""
        _require(self.control in _CONTROLS, "control", self.control, "one of " + ", ".join(map(repr, _CONTROLS)))
        _require(bool(self.components), "components", dict(self.components), "at least one transformer")
        _require(isinstance(self.steps, int) and self.steps >= 0, "steps", self.steps, "a number of steps")
        if self.error is not None:
            _require(0 < self.error < 1, "error", self.error, "above 0 and below 1")
        if self.control == "error":
            _require(self.error is not None, "error", self.error, "given where control is 'error'")
        for name, part in self.components.items():
            if self.control == "density":
                _require(bool(part.density), f"{name}.density", {}, "given where control is 'density'")
            if self.control == "plan":
                _require(part.plan is not None, f"{name}.plan", None, "given where control is 'plan'")

    def save(self, path: str | Path) -> Path:
        """Write JSON that can be read and, for what is large, safetensors beside it; the pair appears whole or not at all.

        Args:
            path: a file that ends with ``.json``, or a folder, in which it becomes ``profile.json``.

        Returns:
            The JSON file.

        Raises:
            OSError: if nothing can be written there.
        """
        from dit_accel.profiles.files import save

        return save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read what :meth:`save` wrote, from the JSON file or its folder.

        Raises:
            FileNotFoundError: if the file, or the one with its tensors, is absent.
            ValueError: if it is corrupt, cut short, no profile, or of a newer version; the message names the file.
        """
        from dit_accel.profiles.files import load

        return load(path)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, message: str = "Upload profile") -> str:
        """Upload to a model repository of the Hugging Face Hub; it is created if it does not exist.

        Returns:
            The address of the commit.

        Raises:
            ImportError: without ``huggingface_hub``.
        """
        from dit_accel.profiles.hub import push

        return push(self, repo_id, private=private, message=message)

    @classmethod
    def from_hub(cls, repo_id: str, revision: str | None = None) -> Profile:
        """Download ``profile.json`` and its tensors from a repository of the Hugging Face Hub.

        Raises:
            ImportError: without ``huggingface_hub``.
            ValueError: if the repository holds no profile; otherwise what :meth:`load` raises.
        """
        from dit_accel.profiles.hub import pull

        return pull(repo_id, revision)

    def __str__(self) -> str:
        """What it is, a few lines."""
        wanted = f" for {self.target}" if self.target else ""
        named = f" {self.name}" if self.name else ""
        lines = [f"profile{named}: {self.method.name}{wanted}, {self.steps or 'any number of'} steps"]
        for name, part in self.components.items():
            lines.append(f"  {name}: {part.model}, {len(part.layers)} layers of {part.heads} heads at {part.geometry}")
            for branch, density in part.density.items():
                told = f"{density.mean():.3f} (heads {density.min():.3f} to {density.max():.3f})"
                lines.append(
                    f"    density of sparse steps {told}" + ("" if branch == ANY_BRANCH else f", branch {branch}")
                )
        lines += [f"  {_MEASURED.get(key, key)}: {_shown(value)}" for key, value in self.measured.items()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


# What the numbers of a calibration are called where a person reads them.
_MEASURED = {
    "error": "measured, relative error of attention",
    "psnr": "measured, PSNR against dense in dB",
    "density": "measured, work over dense work of the whole run",
}


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _require(ok: bool, field: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"a profile's {field} must be {expected}, got {value!r}")
