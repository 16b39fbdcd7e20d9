"""Listening to an accelerated transformer. The only file here that knows how the engine is built inside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor

from dit_accel.adapter import StepInfo
from dit_accel.geometry import TokenGeometry
from dit_accel.plan import Plan
from dit_accel.runtime import ModelRun

__all__ = ["Call", "Listener"]


@dataclass(frozen=True, eq=False)
class Call:
    """One self-attention call as the engine saw it.

    Attributes:
        layer: index of the layer.
        step: where it stands in the run.
        geometry: where its tokens sit.
        query: ``[B, S, H, D]`` in natural order.
        key: like ``query``, or with further keys behind.
        scale: factor of the logits, ``None`` for ``D ** -0.5``.
        key_valid: bool ``[B, Sk]`` or ``None``.
        plan: the plan of the call, or that it made, ``None`` on a dense call without one.
        dense: why dense attention was computed, ``None`` on a sparse call.
    """

    layer: int
    step: StepInfo
    geometry: TokenGeometry
    query: Tensor
    key: Tensor
    scale: float | None
    key_valid: Tensor | None
    plan: Plan | None
    dense: str | None


class Listener:
    """Tells of every attention call of a run, for as long as its ``with`` block lasts.

    It shadows methods on the run object, which is ours, and takes the shadows away again: ``begin_forward`` and ``attend``,
    which are the engine's seam to model libraries, and those that make a plan and carry one out.

    Args:
        run: of a handle.
        wanted: asked with layer and step before a call is told; calls that nobody wants cost nothing.
        tell: called after each wanted call.

    Raises:
        RuntimeError: the engine has changed, and nothing tells of plans any more.
    """

    _PUBLIC = ("begin_forward", "attend")
    #: What gives or takes a plan: the one carried out, and the one made on a planning step.
    _OF_PLANS = ("_sparse", "_plan")

    def __init__(self, run: ModelRun, wanted: Callable[[int, StepInfo], bool], tell: Callable[[Call], None]) -> None:
        self._run, self._wanted, self._tell = run, wanted, tell
        self._geometry: TokenGeometry | str = "the transformer was not entered"
        self._step = StepInfo()
        self._plan: Plan | None = None

    def __enter__(self) -> Listener:
        run = self._run
        if not all(hasattr(run, name) for name in self._OF_PLANS):
            raise RuntimeError(f"ModelRun must have {' and '.join(self._OF_PLANS)} for its plans to be seen")
        begin, attend = (getattr(run, name) for name in self._PUBLIC)

        def begin_forward(geometry: TokenGeometry | str, step: StepInfo) -> None:
            self._geometry, self._step = geometry, step
            begin(geometry, step)

        def attend_(query: Tensor, key: Tensor, value: Tensor, *, layer: int, **options: Any) -> Tensor:
            step, geometry = self._step, self._geometry
            if not self._wanted(layer, step) or isinstance(geometry, str):
                return attend(query, key, value, layer=layer, **options)  # type: ignore[no-any-return]
            self._plan, before = None, Counter(run.ledger.dense[layer])
            out: Tensor = attend(query, key, value, layer=layer, **options)
            dense = next(iter(Counter(run.ledger.dense[layer]) - before), None)
            known = options.get("scale"), options.get("key_valid")
            self._tell(Call(layer, step, geometry, query, key, *known, self._plan, dense))
            return out

        shadows = {name: self._noting(getattr(run, name)) for name in self._OF_PLANS}
        run.__dict__.update(shadows, begin_forward=begin_forward, attend=attend_)
        return self

    def _noting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The same, noting the plan that it is given or gives."""

        def noting(*args: Any, **kwargs: Any) -> Any:
            made = original(*args, **kwargs)
            self._plan = next((x for x in (made, *args, *kwargs.values()) if isinstance(x, Plan)), self._plan)
            return made

        return noting

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in (*self._PUBLIC, *self._OF_PLANS):
            self._run.__dict__.pop(name, None)

    def why_unseen(self, layer: int) -> str:
        """Why no call of a layer was told of."""
        if isinstance(self._geometry, str):
            return self._geometry
        reasons = list(self._run.ledger.dense.get(layer, ()))
        return ", ".join(reasons) or "the layer was not called at this step"
