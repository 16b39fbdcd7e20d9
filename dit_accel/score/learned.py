"""Scores of a trained scorer that the user brings (SeerAttention's gate, arXiv 2410.13276, and the like)."""

from __future__ import annotations

from typing import Any

import torch

from dit_accel._specs import parse_spec
from dit_accel.context import PlanContext
from dit_accel.learned import BlockFeatures, find_scorer
from dit_accel.score._registry import SCORES, Scores


def _cost(method: object, geometry: object) -> float:
    return float(0.5 / (getattr(method, "block_q", 64) * getattr(method, "block_k", 64)))


def _check(method: Any, model: str, layers: tuple[str, ...]) -> None:
    """Called when a transformer is accelerated."""
    spec = parse_spec(method.score)
    scorer = find_scorer(str(spec.args[0] if spec.args else spec.kwargs["name"]))
    check = getattr(scorer, "check", None)
    if check is not None:
        check(method, model, layers)


@SCORES.register("learned", paper="arXiv 2410.13276", cost=_cost, check=_check)
def learned(ctx: PlanContext, name: str) -> Scores:
    """Softmax over the logits of the scorer that was registered under ``name``; see :mod:`dit_accel.learned`.

    Key blocks without a valid token get 0.

    Raises:
        ValueError: no such scorer, or its logits have another shape or dtype.
    """
    features = BlockFeatures.of(ctx)
    logits = find_scorer(str(name))(features)
    expected = (*ctx.query.shape[:2], ctx.q_blocks, ctx.k_blocks)
    if logits.dtype != torch.float32 or tuple(logits.shape) != expected:
        raise ValueError(
            f"scorer {name!r} must give float32 {list(expected)}, got {logits.dtype} {list(logits.shape)} in layer "
            f"{ctx.layer}"
        )
    logits = logits.masked_fill((features.count == 0)[:, None, None], -torch.inf)
    ctx.spend(_cost(ctx.method, ctx.geometry))
    return Scores(logits.softmax(-1))
