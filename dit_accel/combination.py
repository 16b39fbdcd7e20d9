"""Slots of a method that cannot go together, where no single slot knows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dit_accel.compensate import Compensation, make_compensation
from dit_accel.pattern import PATTERNS
from dit_accel.score import SCORES

if TYPE_CHECKING:
    from dit_accel.method import Method

__all__ = ["check_combination", "keeps_data"]


def keeps_data(compensate: str) -> bool:
    """Whether a compensation keeps what it has seen of a layer's queries, keys and values in the plan."""
    kind = type(make_compensation(compensate))
    return kind.prepare is not Compensation.prepare or kind.settle is not Compensation.settle


def check_combination(method: Method) -> None:
    """Check that reuse, selection and compensation fit what the plan is made from.

    Raises:
        ValueError: naming the slots that cannot go together, and their values.
    """
    if method.is_geometric and method.select != "top_k":
        raise ValueError(
            f"select={method.select!r} cannot go with score={method.score!r}: a pattern has chosen its blocks already; "
            "leave select out"
        )
    gathers = not method.is_geometric and bool(SCORES.trait(method.score, "gathers", False))
    if gathers and method.select != "insisted":
        raise ValueError(
            f"select={method.select!r} cannot go with score={method.score!r}: it gathers keys itself, and those of further "
            "blocks would count twice; use select='insisted'"
        )
    _check_precision(method, gathers)
    if not method.reuse:
        return
    if method.static:
        raise ValueError(
            f"reuse={method.reuse} cannot go with static=True: a static plan outlives runs; leave reuse out"
        )
    if not method.plans_from_data:
        raise ValueError(
            f"reuse={method.reuse} cannot go with score={method.score!r}: a pattern in a fixed order never changes; "
            "leave reuse out"
        )
    if method.reuse_rules.has_leaders and keeps_data(method.compensate):
        raise ValueError(
            f"compensate={method.compensate!r} cannot go with reuse={method.reuse}: it keeps what belongs to one layer, "
            "and followers have another's plan; use compensate='drop' or 'mean'"
        )


def _check_precision(method: Method, gathers: bool) -> None:
    """Kernels on 8-bit operands know whole blocks and their means, nothing else; ``"auto"`` is 16-bit for the rest."""
    if method.precision_rule.fixed is None:
        return
    what = ""
    if method.is_geometric and PATTERNS.trait(method.score, "windows", False):
        what = f"score={method.score!r}: it has token windows within blocks"
    elif gathers:
        what = f"score={method.score!r}: it gathers single keys"
    elif method.has_levels:
        what = f"select={method.select!r}: it gathers keys of a pyramid"
    if what:
        raise ValueError(
            f"precision={method.precision!r} cannot go with {what}, which 8-bit attention does not have; use "
            "precision='bf16'"
        )
