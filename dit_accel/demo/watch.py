"""Looking at real attention maps: queries, keys and plans of one step, taken from an accelerated run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dit_accel.plan import Plan
from dit_accel.runtime import ModelRun

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Sighting", "Watcher", "head_maps"]

_MAX_LAYERS = 8


@dataclass(frozen=True, eq=False)
class Sighting:
    """One sparse attention call: queries and keys ``[1, H, S, D]`` in natural order, and its plan."""

    layer: int
    query: Tensor
    key: Tensor
    scale: float | None
    plan: Plan


class Watcher:
    """Keeps the first sparse call of some layers of a run, for as long as its ``with`` block lasts.

    It puts one attribute on the run object, which is ours, and takes it away again.
    """

    def __init__(self, run: ModelRun) -> None:
        self._run = run
        count = len(run.layers)
        take = min(count, _MAX_LAYERS)
        self._layers = {round(i * (count - 1) / max(take - 1, 1)) for i in range(take)}
        self.sightings: dict[int, Sighting] = {}

    def __enter__(self) -> Watcher:
        original = self._run._sparse

        def watched(call: Any, plan: Plan) -> Tensor:
            if call.layer in self._layers and call.layer not in self.sightings:
                kept = (x[:1].detach().clone() for x in (call.query, call.key))
                self.sightings[call.layer] = Sighting(call.layer, next(kept), next(kept), call.scale, plan)
            return original(call, plan)

        self._run.__dict__["_sparse"] = watched
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run.__dict__.pop("_sparse", None)


def head_maps(sightings: Sequence[Sighting]) -> list[Any]:
    """Exact maps of every head seen, as :class:`dit_accel_eval.maps.HeadMaps`."""
    from dit_accel_eval.maps import HeadMaps
    from dit_accel_kernels import attention_lse, block_mass, permute_tokens

    found = []
    for seen in sightings:
        plan, order = seen.plan, seen.plan.order
        block: dict[str, Any] = {"block_q": plan.mask.block_q, "block_k": plan.mask.block_k}
        lse = attention_lse(seen.query, seen.key, scale=seen.scale)
        raster = block_mass(seen.query, seen.key, lse, scale=seen.scale, **block).cpu()
        ordered = raster
        if order is not None:
            keys = permute_tokens(seen.key, order)
            ordered = block_mass(seen.query, keys, lse, scale=seen.scale, order=order, **block).cpu()
        kept = plan.mask.levels()[0].cpu() != 0
        heads = raster.shape[1]
        kept = kept.expand(heads, -1, -1)
        choice = [0] * heads if order is None else order.head.tolist()
        for head in range(heads):
            name = "raster" if order is None else plan.order_names[choice[head]]
            found.append(HeadMaps(seen.layer, head, name, raster[0, head], ordered[0, head], kept[head]))
    return found
