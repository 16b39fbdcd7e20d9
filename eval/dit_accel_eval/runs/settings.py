"""What a run is about: everything that its results follow from, kept in ``run.json`` and compared when it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dit_accel_eval.compare import Configuration
from dit_accel_eval.runs.errors import EvalError
from dit_accel_eval.runs.rows import DENSE, row_to_dict

__all__ = ["VERSION", "RunSettings", "Sample"]

VERSION = 1


@dataclass(frozen=True, order=True)
class Sample:
    """One clip of every row: a prompt and a seed.

    Attributes:
        index: of the prompt.
        seed: of the noise.
    """

    index: int
    seed: int

    @property
    def stem(self) -> str:
        """Name of its files, without the suffix."""
        return f"{self.index:04d}_{self.seed}"


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run.

    Attributes:
        pipeline: ``id``, ``class``, ``digest``, ``dtype`` and ``device``.
        prompts: what is generated.
        seeds: each prompt is generated with each of them.
        rows: what is compared with dense.
        call: arguments of the pipeline call.
        metrics: paired metrics.
        distribution: metrics of all clips of a row against all dense clips.
        vbench: dimensions measured on every clip by itself.
        profile: ``"offline"`` or ``"official"``, the extractors of the last two.
        calibration: prompts that static methods are calibrated on, apart from ``prompts``.
        batch: prompts in one pipeline call.
        attention: whether attention outputs are compared, on the first prompt.
        threads: CPU threads; sums may be rounded otherwise with another number.
        command: the command line, for the report.
    """

    pipeline: Mapping[str, Any]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    rows: tuple[Configuration, ...]
    call: Mapping[str, Any]
    metrics: tuple[str, ...]
    distribution: tuple[str, ...] = ()
    vbench: tuple[str, ...] = ()
    profile: str = "offline"
    calibration: tuple[str, ...] = ()
    batch: int = 1
    attention: bool = True
    threads: int = 1
    command: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        """Check what the loops rely on."""
        if not self.prompts or any(not prompt.strip() for prompt in self.prompts):
            raise EvalError("there must be at least one prompt, and none may be empty")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise EvalError(f"seeds must be different numbers, at least one, got {list(self.seeds)}")
        for name in ("batch", "threads"):
            if getattr(self, name) < 1:
                raise EvalError(f"{name} must be at least 1, got {getattr(self, name)}")
        names = [DENSE, *(row.name for row in self.rows)]
        if len(set(names)) != len(names):
            raise EvalError(f"configurations must have names of their own, other than {DENSE!r}, got {names[1:]}")

    @property
    def samples(self) -> list[Sample]:
        """Every prompt with every seed."""
        return [Sample(index, seed) for index in range(len(self.prompts)) for seed in self.seeds]

    @property
    def groups(self) -> list[list[Sample]]:
        """Samples of one pipeline call each."""
        samples = self.samples
        return [samples[start : start + self.batch] for start in range(0, len(samples), self.batch)]

    @property
    def all_rows(self) -> list[Configuration]:
        """The baseline, then what is compared with it."""
        return [Configuration(DENSE), *self.rows]

    @property
    def steps(self) -> int | None:
        """Denoising steps, where the call names them."""
        value = self.call.get("num_inference_steps")
        return value if isinstance(value, int) else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: ``run.json`` without the environment."""
        data = {
            "version": VERSION,
            "command": self.command,
            "pipeline": dict(self.pipeline),
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "configurations": [row_to_dict(row) for row in self.rows],
            "call": dict(self.call),
            "metrics": list(self.metrics),
            "distribution": list(self.distribution),
            "vbench": list(self.vbench),
            "profile": self.profile,
            "calibration": list(self.calibration),
            "batch": self.batch,
            "attention": self.attention,
            "threads": self.threads,
        }
        loaded: dict[str, Any] = json.loads(json.dumps(data))
        return loaded

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunSettings:
        """Rebuild from :meth:`to_dict`.

        Raises:
            EvalError: the data are of a newer version, or parts are missing.
        """
        if data.get("version") != VERSION:
            raise EvalError(f"run.json must be of version {VERSION}, got {data.get('version')!r}")
        try:
            rows = tuple(Configuration(**row) for row in data["configurations"])
            lists: dict[str, Any] = {
                k: tuple(data[k]) for k in ("prompts", "seeds", "metrics", "distribution", "vbench", "calibration")
            }
            plain: dict[str, Any] = {
                k: data[k] for k in ("pipeline", "call", "profile", "batch", "attention", "threads", "command")
            }
        except (KeyError, TypeError) as error:
            raise EvalError(f"run.json has parts missing or unknown: {error}") from None
        return cls(rows=rows, **lists, **plain)

    def differences(self, other: RunSettings) -> list[str]:
        """What differs, in words: ``what: theirs there, ours here``. The command and the threads do not count."""
        here, there = self.to_dict(), other.to_dict()
        found: list[str] = []
        for key in here:
            if key not in ("command", "threads", "version"):
                found += _differ(key, there[key], here[key])
        return found


def _differ(key: str, there: Any, here: Any) -> list[str]:
    if there == here:
        return []
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted({*there, *here})
        return [line for k in keys for line in _differ(f"{key}.{k}", there.get(k), here.get(k))]
    if key == "configurations":
        return _differ("configuration names", [r["name"] for r in there], [r["name"] for r in here]) or [
            line for a, b in zip(there, here) for line in _differ(f"configuration {a['name']!r}", a, b)
        ]
    if isinstance(there, list) and isinstance(here, list) and len(there) != len(here):
        return [f"{key}: {len(there)} there ({_short(there)}), {len(here)} here ({_short(here)})"]
    return [f"{key}: {_short(there)} there, {_short(here)} here"]


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
