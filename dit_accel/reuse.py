"""How long a plan lives, besides the fixed schedule of a method: policies that any method takes.

======================  ==================================================================================================
``every:k``             made again every ``k`` steps (LServe); ``every:1`` is every step
``every:k,dense=true``  likewise, and plans are made on dense steps (Recycled Attention)
``similar:c``           made again once the mean query has turned: its cosine with that of the plan's step fell below ``c``
                        (TokenSelect, arXiv 2411.02886). Measured at one step and acted upon at the next.
``leaders:0x4x8``       only these layers plan; each other layer follows the last leader before it (DELTA, TidalDecode).
                        Layers before the first leader plan for themselves.
``leaders:every=4``     layers 0, 4, 8 and so on lead
``leaders:count=2``     so many leaders, evenly spread: layer 0 and the one in the middle
======================  ==================================================================================================

With ``dense=true``, as in ``leaders:count=2,dense=true``, leaders are dense layers, which plan for those who follow: the
selection layers of DELTA and TidalDecode. A refresh of a method that needs the log-sum-exp of dense attention uses that of
the first plan, unless it happens on a dense step or in a dense leader, where it is fresh.

With ``branches="shared"`` guidance branches use the plans of the branch that the pipeline calls first, which is the
conditional one in the pipelines of diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from dit_accel._specs import Spec, Value, parse_spec

__all__ = ["Reuse", "parse_reuse"]

_EXPECTED = (
    "'every:K' with K >= 1 steps, 'similar:C' with a cosine C above 0 and at most 1, or 'leaders:0x4x8' with layer "
    "numbers, 'leaders:every=N' or 'leaders:count=N'; 'every' and 'leaders' take dense=true"
)


@dataclass(frozen=True)
class Reuse:
    """Parsed policies.

    Attributes:
        every: steps between plans, 0 for none.
        similar: least cosine of the mean queries, 0 for none.
        leaders: layers that plan, sorted; empty for all.
        leader_every: every so many layers one leads, 0 for none.
        leader_count: number of leaders, evenly spread, 0 for none.
        every_dense: whether plans are made on dense steps.
        leaders_dense: whether leaders are dense layers.
    """

    every: int = 0
    similar: float = 0.0
    leaders: tuple[int, ...] = ()
    leader_every: int = 0
    leader_count: int = 0
    every_dense: bool = False
    leaders_dense: bool = False

    @property
    def has_leaders(self) -> bool:
        """Whether some layers follow others."""
        return bool(self.leaders or self.leader_every or self.leader_count)

    def leader_of(self, layers: int) -> tuple[int, ...]:
        """The layer whose plans each of ``layers`` layers uses; its own number for those that plan.

        Raises:
            ValueError: if a leader does not exist.
        """
        if not self.has_leaders:
            return tuple(range(layers))
        chosen = self.leading(layers)
        return tuple(max((i for i in chosen if i <= layer), default=layer) for layer in range(layers))

    def leading(self, layers: int) -> tuple[int, ...]:
        """The leaders of a model of so many layers; none where every layer plans for itself.

        Raises:
            ValueError: if a leader does not exist.
        """
        bad = [i for i in self.leaders if i >= layers]
        if bad or self.leader_count > layers:
            asked = f"leaders {bad}" if bad else f"{self.leader_count} leaders"
            raise ValueError(f"reuse: leaders must lie in 0..{layers - 1} in a model of {layers} layers, got {asked}")
        if self.leader_every:
            return tuple(range(0, layers, self.leader_every))
        if self.leader_count:
            return tuple(i * layers // self.leader_count for i in range(self.leader_count))
        return self.leaders


@lru_cache(maxsize=64)
def _parse(specs: tuple[str, ...]) -> Reuse:
    found: dict[str, object] = {}
    names: set[str] = set()
    for text in specs:
        spec = parse_spec(text)
        if spec.name in names:
            raise ValueError(f"reuse names {spec.name!r} twice: {specs}")
        names.add(spec.name)
        found.update(_values(spec))
    return Reuse(**found)  # type: ignore[arg-type]


def _values(spec: Spec) -> dict[str, object]:
    """Fields of :class:`Reuse` that a spec sets."""
    found: dict[str, object] = {}
    options = dict(spec.kwargs)
    dense = options.pop("dense", False)
    value = spec.args[0] if len(spec.args) == 1 else None
    value = None if isinstance(value, bool) else value
    ok = isinstance(dense, bool) and not (options and spec.args)
    if spec.name == "every" and not options and isinstance(value, int) and value >= 1:
        found = {"every": value, "every_dense": dense}
    elif spec.name == "similar" and not spec.kwargs and isinstance(value, int | float) and 0 < value <= 1:
        found = {"similar": float(value)}
    elif spec.name == "leaders":
        found = {**_leaders(value, options), "leaders_dense": dense}
        ok = ok and len(found) == 2
    if not found or not ok:
        raise ValueError(f"reuse must be {_EXPECTED}, got '{spec}'")
    return found


def _leaders(value: object, options: dict[str, Value]) -> dict[str, object]:
    """Which layers lead; empty if it is not said well."""
    if options:
        name, count = next(iter(options.items()))
        ok = len(options) == 1 and name in ("every", "count")
        ok = ok and isinstance(count, int) and not isinstance(count, bool) and count >= 1
        return {f"leader_{name}": count} if ok else {}
    layers = (value,) if isinstance(value, int) else value
    if not isinstance(layers, tuple) or not all(isinstance(i, int) and i >= 0 for i in layers):
        return {}
    return {"leaders": tuple(sorted(set(layers)))}


def parse_reuse(specs: Sequence[str]) -> Reuse:
    """Parse the ``reuse`` slot of a method.

    Raises:
        ValueError: for an unknown policy or a bad value.
    """
    return _parse(tuple(specs))
