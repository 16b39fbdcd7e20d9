"""The file format of profiles: JSON for people, safetensors beside it for curves and static plans.

The tensors lie in a file whose name holds a digest of them, and the JSON names it. It is written first, so that a reader
finds the old pair or the new one, whenever the writer is stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from dit_accel._files import write_whole
from dit_accel._version import __version__
from dit_accel.geometry import TokenGeometry
from dit_accel.method import Method
from dit_accel.profiles.fingerprint import Fingerprint
from dit_accel.profiles.profile import PROFILE_VERSION, ComponentProfile, ErrorCurve, Profile
from dit_accel.static_plan import StaticPlan
from dit_accel.targets.quality import QualityCurve

__all__ = ["FORMAT", "load", "location", "save"]

FORMAT = "dit_accel.profile"
_PLAN_FORMAT = "dit_accel.static_plan"
_DIGITS = 4
_KEYS = {
    "format", "version", "dit_accel_version", "name", "task", "steps", "target", "control", "error", "method",
    "components", "quality", "measured", "made_on", "notes", "tensors", "sha256",
}  # fmt: skip


def location(path: str | Path) -> Path:
    """The JSON file that a path means: itself, or ``profile.json`` of a folder."""
    path = Path(path)
    return path if path.suffix == ".json" else path / "profile.json"


def save(profile: Profile, path: str | Path) -> Path:
    """Write a profile; see :meth:`Profile.save`."""
    file = location(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    before = _tensors_named_by(file)
    tensors: dict[str, Tensor] = {}
    components = {name: _component_to_dict(name, part, tensors) for name, part in profile.components.items()}
    data = save_tensors({key: value.contiguous() for key, value in tensors.items()}) if tensors else b""
    digest = hashlib.sha256(data).hexdigest() if tensors else None
    beside = None if digest is None else f"{file.stem}.{digest[:8]}.safetensors"
    record = {
        "format": FORMAT,
        "version": PROFILE_VERSION,
        "dit_accel_version": __version__,
        "name": profile.name,
        "task": profile.task,
        "steps": profile.steps,
        "target": profile.target,
        "control": profile.control,
        "error": profile.error,
        "method": profile.method.to_dict(),
        "quality": None if profile.curve is None else profile.curve.to_dict(),
        "measured": dict(profile.measured),
        "made_on": dict(profile.made_on),
        "notes": list(profile.notes),
        "tensors": beside,
        "sha256": digest,
        "components": components,
    }
    text = _readable(record) + "\n"
    if beside is not None:
        write_whole(file.parent / beside, data)
    write_whole(file, text.encode())
    if before is not None and before != beside:
        (file.parent / before).unlink(missing_ok=True)
    return file


def _tensors_named_by(file: Path) -> str | None:
    """The tensors that belong to what is about to be replaced, if it is a profile."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        return None
    name = record.get("tensors")
    return name if isinstance(name, str) and Path(name).name == name else None


def _readable(record: Any, indent: int = 0) -> str:
    """JSON with lists of plain values on one line."""
    pad = "  " * (indent + 1)
    if isinstance(record, dict) and record:
        rows = [f"{pad}{json.dumps(str(k), ensure_ascii=False)}: {_readable(v, indent + 1)}" for k, v in record.items()]
        return "{\n" + ",\n".join(rows) + "\n" + "  " * indent + "}"
    if isinstance(record, list) and any(isinstance(item, dict) for item in record):
        return "[\n" + ",\n".join(pad + _readable(v, indent + 1) for v in record) + "\n" + "  " * indent + "]"
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def _component_to_dict(name: str, part: ComponentProfile, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Readable part of a component; what is large goes to ``tensors``."""
    if part.curve is not None:
        tensors[f"{name}.error"], tensors[f"{name}.output"] = part.curve.error, part.curve.output
    layers = []
    for index, layer in enumerate(part.layers):
        row: dict[str, Any] = {"name": layer, "dense": index in part.dense_layers}
        row["precision"] = part.precision[index] if part.precision else "method"
        if part.orders:
            row["orders"] = list(part.orders[index])
        if part.density:
            row["density"] = {b: _rounded(density[:, index]) for b, density in part.density.items()}
        layers.append(row)
    return {
        "model": part.model,
        "fingerprint": part.fingerprint.to_dict(),
        "geometry": _geometry_to_dict(part.geometry),
        "heads": part.heads,
        "starts": list(part.starts),
        "curve_densities": None if part.curve is None else list(part.curve.densities),
        "curve_by_head": part.curve is None or part.curve.by_head,
        "plan": None if part.plan is None else _plan_to_dict(name, part.plan, tensors),
        "layers": layers,
    }


def _rounded(density: Tensor) -> list[list[float]]:
    least = 10.0**-_DIGITS
    return [[max(round(value, _DIGITS), least) for value in row] for row in density.double().tolist()]


def _geometry_to_dict(geometry: TokenGeometry) -> dict[str, Any]:
    grid = None if geometry.grid is None else list(geometry.grid)
    return {"grid": grid, "prefix": geometry.prefix, "suffix": geometry.suffix, "visual": geometry.visual}


def _geometry_from_dict(data: Mapping[str, Any]) -> TokenGeometry:
    grid = data["grid"]
    return TokenGeometry(None if grid is None else tuple(grid), data["prefix"], data["suffix"], data["visual"])


def _plan_to_dict(name: str, plan: StaticPlan, tensors: dict[str, Tensor]) -> dict[str, Any]:
    tensors[f"{name}.plan.head_choice"], tensors[f"{name}.plan.bits"] = plan.head_choice, plan.bits
    if plan.windows is not None:
        tensors[f"{name}.plan.windows"] = plan.windows
    geometry = plan.geometry
    return {
        "format": _PLAN_FORMAT,
        "version": 1,
        "method": plan.method.to_dict(),
        "model": plan.model,
        "geometry": [geometry.grid and list(geometry.grid), geometry.prefix, geometry.suffix],
        "steps": plan.steps,
    }


def load(path: str | Path) -> Profile:
    """Read a profile; see :meth:`Profile.load`."""
    file = location(path)
    if not file.is_file():
        raise FileNotFoundError(f"no profile at {file}")
    record = _record(file)
    tensors = _tensors(file, record)
    try:
        components = {
            str(name): _component_from_dict(str(file), str(name), data, tensors)
            for name, data in record["components"].items()
        }
        return Profile(
            method=Method.from_dict(record["method"]),
            components=components,
            control=record["control"],
            target=record["target"],
            error=record["error"],
            task=record["task"],
            steps=record["steps"],
            curve=None if record["quality"] is None else QualityCurve.from_dict(record["quality"]),
            measured=record["measured"],
            made_on=record["made_on"],
            name=record["name"],
            notes=tuple(record["notes"]),
        )
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{file} is a profile with parts missing or of another type: {error!r}") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _record(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not a profile: not JSON, or cut short ({error})") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{file} is not a profile of dit_accel: its format must be {FORMAT!r}, got {found!r}")
    version = record.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version > PROFILE_VERSION:
        raise ValueError(
            f"{file} has version {version!r}, this dit_accel reads up to {PROFILE_VERSION}; a newer dit_accel is needed"
        )
    if set(record) != _KEYS:
        missing, unknown = sorted(_KEYS - set(record)), sorted(set(record) - _KEYS)
        raise ValueError(f"{file} must have the keys of a profile; missing {missing}, unknown {unknown}")
    return record


def _tensors(file: Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    name = record["tensors"]
    if name is None:
        return {}
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"{file}: tensors must be the name of a file beside it, got {name!r}")
    beside = file.parent / name
    if not beside.is_file():
        raise FileNotFoundError(f"{file} names {name}, which is not beside it")
    data = beside.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != record["sha256"]:
        raise ValueError(f"{beside} is not what {file.name} was written with: SHA-256 {digest}, not {record['sha256']}")
    try:
        found: dict[str, Tensor] = load_tensors(data)
    except SafetensorError as error:
        raise ValueError(f"{beside} is not readable: {error}") from None
    return found


def _component_from_dict(
    file: str, name: str, data: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> ComponentProfile:
    rows = data["layers"]
    branches = list(rows[0].get("density", {})) if rows else []
    density = {b: torch.tensor([row["density"][b] for row in rows]).transpose(0, 1).contiguous() for b in branches}
    curve = None
    if data["curve_densities"] is not None:
        held = tensors[f"{name}.error"], tensors[f"{name}.output"]
        curve = ErrorCurve(tuple(data["curve_densities"]), *held, by_head=data["curve_by_head"])
    plan = None
    if data["plan"] is not None:
        own = f"{name}.plan."
        own_tensors = {key.removeprefix(own): value for key, value in tensors.items() if key.startswith(own)}
        plan = StaticPlan._from_parts(file, data["plan"], own_tensors)
    return ComponentProfile(
        model=data["model"],
        fingerprint=Fingerprint(**data["fingerprint"]),
        geometry=_geometry_from_dict(data["geometry"]),
        layers=tuple(row["name"] for row in rows),
        heads=data["heads"],
        starts=tuple(data["starts"]),
        density=density,
        orders=tuple(tuple(row["orders"]) for row in rows) if rows and "orders" in rows[0] else (),
        precision=tuple(row["precision"] for row in rows),
        dense_layers=tuple(index for index, row in enumerate(rows) if row["dense"]),
        curve=curve,
        plan=plan,
    )
