"""What the engine did in one pipeline call, in plain JSON types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import dit_accel
from dit_accel.ledger import RunStatus

__all__ = ["engine_record"]

_DIGITS = 4


def engine_record(handle: dit_accel.Handle, *, with_map: bool = False) -> tuple[dict[str, Any], float]:
    """What was computed over all transformers of a pipeline, and the milliseconds spent planning.

    Args:
        handle: of the call that has just ended.
        with_map: whether to add the density of every head at every layer and step.
    """
    stats = handle.stats()
    several = len(stats) > 1
    calls = sum(s.calls for s in stats.values())
    sparse = sum(s.sparse_calls for s in stats.values())
    record: dict[str, Any] = {
        "density": _mean([(s.density, s.calls) for s in stats.values()], 1.0),
        "sparse_density": _mean([(s.sparse_density, s.sparse_calls) for s in stats.values()], 1.0),
        "backend": ", ".join(sorted({s.backend for s in stats.values() if s.backend})),
        "calls": calls,
        "sparse_calls": sparse,
        "plan_work": _mean([(s.plan_work, s.calls) for s in stats.values()], 0.0),
        "plans": sum(s.plans for s in stats.values()),
        "cache_hits": sum(s.cache_hits for s in stats.values()),
        "density_by_step": _by_step(stats),
        "layers": [layer for name, s in stats.items() for layer in _layers(s, f"{name}." if several else "")],
        "reasons": _reasons(stats),
        "notes": sorted({note for s in stats.values() for note in s.notes}),
        "density_map": _density_map(handle) if with_map else None,
    }
    return record, sum(s.plan_ms for s in stats.values())


def _mean(values: list[tuple[float, int]], empty: float) -> float:
    weight = sum(count for _, count in values)
    return sum(value * count for value, count in values) / weight if weight else empty


def _by_step(stats: Mapping[str, RunStatus]) -> dict[str, float]:
    """Work over dense work by step; transformers that share a step are averaged."""
    found: dict[int, list[float]] = {}
    for status in stats.values():
        for step, value in status.density_by_step.items():
            found.setdefault(step, []).append(value)
    return {str(step): sum(values) / len(values) for step, values in sorted(found.items())}


def _reasons(stats: Mapping[str, RunStatus]) -> dict[str, int]:
    found: dict[str, int] = {}
    for status in stats.values():
        for reason, count in status.reasons.items():
            found[reason] = found.get(reason, 0) + count
    return dict(sorted(found.items()))


def _layers(status: RunStatus, prefix: str) -> list[dict[str, Any]]:
    return [
        {
            "name": prefix + layer.name,
            "sparse": layer.sparse,
            "dense": dict(sorted(layer.dense.items())),
            "density": layer.density,
            "head_density": [round(value, _DIGITS) for value in layer.head_density],
            "orders": list(layer.orders),
        }
        for layer in status.layers
    ]


def _density_map(handle: dit_accel.Handle) -> dict[str, Any] | None:
    """Exact share of each head by step and layer, mean over guidance branches: ``values[step][layer][head]``.

    A layer that was not called at a step has an empty list.
    """
    sums: dict[tuple[int, int], list[torch.Tensor]] = {}
    heads: dict[int, int] = {}
    first = 0
    for run in handle.runs.values():
        for call in run.ledger.calls:
            if call.step is None:
                return None
            share = call.exact.detach().float().mean(0).cpu() if isinstance(call.exact, torch.Tensor) else torch.ones(1)
            place = first + call.layer
            heads[place] = max(heads.get(place, 1), share.numel())
            sums.setdefault((call.step, place), []).append(share)
        first += len(run.layers)
    steps = sorted({step for step, _ in sums})
    values = [[_heads(sums.get((step, place)), heads.get(place, 1)) for place in range(first)] for step in steps]
    return {"steps": steps, "values": values} if steps else None


def _heads(shares: list[torch.Tensor] | None, count: int) -> list[float]:
    if not shares:
        return []
    mean = torch.stack([share.expand(count) for share in shares]).mean(0)
    return [round(value, _DIGITS) for value in mean.tolist()]
