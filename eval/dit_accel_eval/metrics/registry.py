"""Paired metrics by name: what each means, which extractor it uses and whether it can be computed here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel_eval.metrics.frames import as_pair

__all__ = ["MetricRegistry", "PairedMetric", "evaluate"]


def _usable() -> str | None:
    return None


@dataclass(frozen=True)
class PairedMetric:
    """One way to measure how far a clip is from its reference.

    Attributes:
        name: name used on the command line and in results; ``@`` parts off the project whose convention it follows.
        summary: what it measures, one line.
        higher_is_better: direction.
        extractor: id of the network or tool that it looks through, ``None`` if it is a formula on pixels.
        convention: the details that change the number, one line.
        compute: from two float clips ``[T, H, W, 3]`` in [0, 1] of one shape to a number.
        missing: why it cannot be used here, ``None`` if it can.
        min_frames: fewest frames for which it is defined.
        min_side: smallest frame side in pixels for which it is defined.
    """

    name: str
    summary: str
    higher_is_better: bool
    extractor: str | None
    convention: str
    compute: Callable[[Tensor, Tensor], float]
    missing: Callable[[], str | None] = _usable
    min_frames: int = 1
    min_side: int = 1

    def inapplicable(self, shape: Sequence[int]) -> str | None:
        """Why it is not defined on clips of this ``[T, H, W, 3]``, ``None`` if it is."""
        if shape[0] < self.min_frames:
            return f"{self.name} needs at least {self.min_frames} frames, got {shape[0]}"
        if min(shape[1:3]) < self.min_side:
            return f"{self.name} needs frames of at least {self.min_side} pixels a side, got {tuple(shape[1:3])}"
        return None


class MetricRegistry(Mapping[str, PairedMetric]):
    """Metrics by name, in the order of registration."""

    def __init__(self, metrics: Iterable[PairedMetric] = ()) -> None:
        self._metrics: dict[str, PairedMetric] = {}
        for metric in metrics:
            self.register(metric)

    def register(self, metric: PairedMetric) -> PairedMetric:
        """Add a metric.

        Raises:
            ValueError: the name is taken.
        """
        if metric.name in self._metrics:
            raise ValueError(f"metric {metric.name!r} is registered already")
        self._metrics[metric.name] = metric
        return metric

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._metrics)

    def __getitem__(self, name: str) -> PairedMetric:
        """The metric called ``name``.

        Raises:
            ValueError: nothing has this name; the message lists what there is and the closest match.
        """
        if name in self._metrics:
            return self._metrics[name]
        close = difflib.get_close_matches(str(name), self._metrics, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"metric must be one of {', '.join(self.names())}, got {name!r}{hint}")

    def __contains__(self, name: object) -> bool:
        return name in self._metrics

    def __iter__(self) -> Iterator[str]:
        return iter(self._metrics)

    def __len__(self) -> int:
        return len(self._metrics)


def evaluate(
    registry: MetricRegistry,
    clip: Any,
    reference: Any,
    names: Sequence[str],
    device: str | torch.device | None,
    labels: tuple[str, str],
) -> dict[str, float]:
    """See :func:`dit_accel_eval.metrics.evaluate_pair`."""
    metrics = [registry[name] for name in names]
    a, b = as_pair(clip, reference, labels)
    if device is not None:
        a, b = a.to(device), b.to(device)
    found: dict[str, float] = {}
    with torch.inference_mode():
        for metric in metrics:
            if metric.inapplicable(a.shape) is not None:
                continue
            reason = metric.missing()
            if reason is not None:
                raise ValueError(f"metric {metric.name!r} cannot be used: {reason}")
            found[metric.name] = float(metric.compute(a, b))
    return found
