"""How long a plan lives, besides the fixed schedule of a method: policies that any method takes.

==================  ======================================================================================================
``every:k``         made again every ``k`` steps (Recycled Attention, LServe); ``every:1`` is every step
``similar:c``       made again once the mean query has turned: its cosine with that of the plan's step fell below ``c``
                    (TokenSelect). Measured on the device at one step and acted upon at the next, so that nothing waits.
``leaders:0x4x8``   only these layers plan; each other layer follows the last leader before it (DELTA, TidalDecode)
==================  ======================================================================================================

Guidance branches share the conditional branch's plans with ``branches="shared"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from dit_accel._specs import Spec, parse_spec

__all__ = ["Reuse", "parse_reuse"]


@dataclass(frozen=True)
class Reuse:
    """Parsed policies.

    Attributes:
        every: steps between plans, 0 for none.
        similar: least cosine of the mean queries, 0 for none.
        leaders: layers that plan, sorted; empty for all.
    """

    every: int = 0
    similar: float = 0.0
    leaders: tuple[int, ...] = ()

    def leader(self, layer: int) -> int:
        """The layer whose plans ``layer`` uses."""
        before = [i for i in self.leaders if i <= layer]
        return before[-1] if before else layer


@lru_cache(maxsize=64)
def _parse(specs: tuple[str, ...]) -> Reuse:
    found: dict[str, object] = {}
    for text in specs:
        spec = parse_spec(text)
        if spec.name in found:
            raise ValueError(f"reuse names {spec.name!r} twice: {specs}")
        found[spec.name] = _value(spec)
    return Reuse(**found)  # type: ignore[arg-type]


def _value(spec: Spec) -> object:
    value = spec.args[0] if len(spec.args) == 1 and not spec.kwargs else None
    if isinstance(value, bool):
        value = None
    if spec.name == "every" and isinstance(value, int) and value >= 1:
        return value
    if spec.name == "similar" and isinstance(value, int | float) and 0 < value <= 1:
        return float(value)
    if spec.name == "leaders":
        layers = (value,) if isinstance(value, int) else value
        if isinstance(layers, tuple) and all(isinstance(i, int) and i >= 0 for i in layers):
            return tuple(sorted(set(layers)))
    raise ValueError(
        f"reuse must be 'every:K' with K >= 1 steps, 'similar:C' with a cosine C above 0 and at most 1, or 'leaders:0x4x8' "
        f"with layer numbers, got '{spec}'"
    )


def parse_reuse(specs: Sequence[str]) -> Reuse:
    """Parse the ``reuse`` slot of a method.

    Raises:
        ValueError: for an unknown policy or a bad value.
    """
    return _parse(tuple(specs))
