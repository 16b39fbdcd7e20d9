"""Reading the folder of a run: settings, samples and the summary, whatever of them is there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["DENSE", "Row", "Run", "Sample", "number", "read_run"]

#: Name of the baseline, which no list of configurations holds.
DENSE = "dense"
_FLOOR_NAME = "another seed"


def number(value: Any) -> float | None:
    """A finite number, or ``None`` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


@dataclass(frozen=True)
class Row:
    """One line of the comparison.

    Attributes:
        name: name of the configuration.
        method: method name, ``None`` for dense attention.
        target: the work or density asked for, as text.
        options: options of :func:`dit_accel.enable`.
        floor: whether it is dense attention with another seed.
    """

    name: str
    method: str | None
    target: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    floor: bool = False

    @property
    def accelerated(self) -> bool:
        """Whether it is neither the baseline nor the floor."""
        return not self.floor and self.name != DENSE


@dataclass(frozen=True)
class Sample:
    """One record of a run.

    Attributes:
        name: name of the configuration.
        prompt: the prompt.
        index: index of the prompt.
        seed: seed of the dense clip that it is compared with.
        metrics: paired metrics; ``None`` where the value was not finite.
        engine: what the engine counted.
        speed: what was timed.
        error: why there is no clip, or ``None``.
        frames: file of the raw frames, ``None`` where it is missing.
        notes: what was noted while measuring.
    """

    name: str
    prompt: str
    index: int
    seed: int
    metrics: Mapping[str, float | None]
    engine: Mapping[str, Any]
    speed: Mapping[str, Any]
    error: str | None
    frames: Path | None
    notes: Sequence[str] = ()

    @property
    def key(self) -> tuple[int, int]:
        """What a sample shares with the others of the same prompt and seed."""
        return self.index, self.seed


@dataclass(frozen=True)
class Run:
    """All of a run that could be read.

    Attributes:
        folder: where it lies.
        settings: ``run.json``.
        rows: the baseline first, then the configurations in the order of ``run.json``.
        samples: records by configuration name, sorted by prompt and seed.
        results: ``results.json``, empty where it is missing.
        problems: files that are missing or could not be read, in words.
    """

    folder: Path
    settings: Mapping[str, Any]
    rows: Sequence[Row]
    samples: Mapping[str, Sequence[Sample]]
    results: Mapping[str, Any]
    problems: Sequence[str]

    @property
    def expected_keys(self) -> list[tuple[int, int]]:
        """Prompt index and seed of every sample that each configuration should have."""
        prompts, seeds = self.settings.get("prompts") or [], self.settings.get("seeds") or [0]
        planned = {(index, seed) for index in range(len(prompts)) for seed in seeds}
        found = {sample.key for samples in self.samples.values() for sample in samples}
        return sorted(planned | found)

    def good(self, name: str) -> list[Sample]:
        """Samples of a configuration that were made."""
        return [sample for sample in self.samples.get(name, ()) if sample.error is None]

    def missing(self) -> dict[str, list[tuple[int, int]]]:
        """Samples without a record, by configuration."""
        lacking = {}
        for row in self.rows:
            have = {sample.key for sample in self.samples.get(row.name, ())}
            lacking[row.name] = [key for key in self.expected_keys if key not in have]
        return {name: keys for name, keys in lacking.items() if keys}

    def errors(self) -> list[Sample]:
        """Samples that failed."""
        return [sample for row in self.rows for sample in self.samples.get(row.name, ()) if sample.error is not None]

    def prompt(self, index: int) -> str:
        """Text of a prompt."""
        prompts = self.settings.get("prompts") or []
        if 0 <= index < len(prompts):
            return str(prompts[index])
        return next((s.prompt for samples in self.samples.values() for s in samples if s.index == index), "")


def _load(path: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object; what is wrong goes to ``problems``."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return {}
    if not isinstance(data, dict):
        problems.append(f"{path.name} must hold a JSON object, got {type(data).__name__}")
        return {}
    return data


def _sample(path: Path, problems: list[str]) -> Sample | None:
    record = _load(path, problems)
    if not record:
        return None
    index, seed, name = (record.get(key) for key in ("prompt_index", "seed", "name"))
    if not isinstance(name, str) or not isinstance(index, int) or not isinstance(seed, int):
        problems.append(f"{path.parent.name}/{path.name} has no name, prompt_index or seed")
        return None
    frames = path.with_suffix(".npz")
    error = record.get("error")
    return Sample(
        name=name,
        prompt=str(record.get("prompt", "")),
        index=index,
        seed=seed,
        metrics={key: number(value) for key, value in _mapping(record.get("metrics")).items()},
        engine=_mapping(record.get("engine")),
        speed=_mapping(record.get("speed")),
        error=None if error is None else str(error),
        frames=frames if frames.is_file() else None,
        notes=[str(note) for note in record.get("notes") or []],
    )


def _row(data: Mapping[str, Any]) -> Row:
    labels = _mapping(data.get("labels"))
    method, name = data.get("method"), str(data.get("name", ""))
    floor = method is None and name != DENSE
    target = labels.get("target")
    return Row(
        name,
        None if method is None else str(method),
        "" if target is None else str(target),
        _mapping(data.get("options")),
        floor,
    )


def _rows(settings: Mapping[str, Any], samples: Mapping[str, Sequence[Sample]]) -> list[Row]:
    """The baseline, what was asked for, and whatever else has samples."""
    rows = {DENSE: Row(DENSE, None)}
    for data in settings.get("configurations") or []:
        row = _row(_mapping(data))
        rows[row.name] = Row(DENSE, None) if row.name == DENSE else row
    for name in samples:
        rows.setdefault(name, Row(name, None if name == _FLOOR_NAME else name, floor=name == _FLOOR_NAME))
    return list(rows.values())


def read_run(folder: str | Path) -> Run:
    """Read the folder of a run; whatever is missing or broken is noted, not raised.

    Raises:
        FileNotFoundError: no such folder, or one without ``run.json``.
        ValueError: ``run.json`` is broken or of a newer version.
    """
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a run: it has no run.json")
    problems: list[str] = []
    settings = _load(folder / "run.json", problems)
    if problems:
        raise ValueError(f"{folder}: {problems[0]}")
    if settings.get("version", 1) != 1:
        raise ValueError(f"{folder}/run.json must be of version 1, got {settings['version']!r}")
    samples: dict[str, list[Sample]] = {}
    for path in sorted(folder.glob("samples/*/*.json")):
        if path.name.startswith("."):  # being written, or left by a killed process
            continue
        sample = _sample(path, problems)
        if sample is not None:
            samples.setdefault(sample.name, []).append(sample)
    for found in samples.values():
        found.sort(key=lambda sample: sample.key)
    results = _load(folder / "results.json", problems)
    return Run(folder, settings, _rows(settings, samples), samples, results, problems)
